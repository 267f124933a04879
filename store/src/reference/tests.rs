use proptest::prelude::*;

use super::*;

fn canonical(text: &str) -> String {
    text.parse::<Source>().unwrap_or_else(|error| panic!("{text}: {error}")).to_string()
}

const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

#[test]
fn plain_names_are_completed_as_docker_completes_them() {
    for (said, meant) in [
        ("debian", "docker.io/library/debian:latest"),
        ("debian:12", "docker.io/library/debian:12"),
        ("docker.io/debian", "docker.io/library/debian:latest"),
        ("index.docker.io/library/debian", "docker.io/library/debian:latest"),
        ("team/job", "docker.io/team/job:latest"),
        ("localhost/job", "localhost/job:latest"),
        ("host:5000/job:7", "host:5000/job:7"),
        ("docker://127.0.0.1:5000/a/b/c", "127.0.0.1:5000/a/b/c:latest"),
        ("[::1]:5000/a", "[::1]:5000/a:latest"),
        ("public.ecr.aws/lambda/python:3.13", "public.ecr.aws/lambda/python:3.13"),
        ("f/a__b-c.d---e", "docker.io/f/a__b-c.d---e:latest"),
        ("never-pulled:1", "docker.io/library/never-pulled:1"),
    ] {
        assert_eq!(canonical(said), meant, "{said}");
    }
    assert_eq!(canonical(&format!("debian@{DIGEST}")), format!("docker.io/library/debian@{DIGEST}"));
    assert_eq!(canonical(&format!("debian:12@{DIGEST}")), format!("docker.io/library/debian:12@{DIGEST}"));
}

#[test]
fn files_are_named_by_absolute_path_and_the_first_colon_ends_it() {
    assert_eq!(canonical("oci:/a/b/"), "oci:/a/b");
    assert_eq!(canonical("oci:/a/b:host:5000/name:tag"), "oci:/a/b:host:5000/name:tag");
    assert_eq!(canonical("oci-archive:/a.tar:it"), "oci-archive:/a.tar:it");
    assert_eq!(canonical("docker-archive:/a.tar:it"), "docker-archive:/a.tar:docker.io/library/it:latest");
    let here = std::env::current_dir().unwrap();
    assert_eq!(canonical("oci:a"), format!("oci:{}/a", here.display()));
}

#[test]
fn what_names_no_image_is_refused_in_a_sentence_with_the_words() {
    let long = "a/".repeat(130) + "a";
    let tag = format!("a:{}", "t".repeat(129));
    for wrong in [
        "NOT A NAME",
        "-a",
        "a-",
        "a//b",
        "a/../b",
        "a___b",
        "a..b",
        ":tag",
        "a:",
        "a:b:c",
        "a:-b",
        "a@sha256:1",
        "a@",
        "Host_/a",
        "host:/a",
        "host:99999/a",
        "[::g]:1/a",
        "http://host/a",
        "dir:/a",
        "docker://",
        "oci:",
        "oci::tag",
        "oci:/a:",
        "docker-archive:/a.tar:NOT A NAME",
        &DIGEST[7..],
        &long,
        &tag,
    ] {
        let error = wrong.parse::<Source>().expect_err(wrong).to_string();
        let words = wrong.strip_prefix("docker-archive:/a.tar:").unwrap_or(wrong);
        assert!(error.contains(&words[..words.len().min(100)]) || wrong == "docker://", "{wrong}: {error}");
    }
    assert!("".parse::<Source>().is_err());
}

#[test]
fn loopback_is_known_by_its_written_address_alone() {
    for host in ["localhost", "localhost:5000", "127.0.0.1", "127.9.9.9:1", "[::1]", "[::1]:5000"] {
        assert!(is_loopback(host), "{host}");
    }
    for host in ["localhost.example.com", "127.0.0.1.example.com", "10.0.0.1", "[::2]:1", "docker.io"] {
        assert!(!is_loopback(host), "{host}");
    }
}

proptest! {
    #[test]
    fn any_words_are_read_or_refused_and_canonical_names_mean_themselves(text in "\\PC{0,60}") {
        if let Ok(source) = text.parse::<Source>() {
            let name = source.to_string();
            prop_assert_eq!(name.parse::<Source>().unwrap().to_string(), name);
        }
    }

    #[test]
    fn names_of_the_grammar_are_read(
        path in "[a-z0-9]{1,5}((\\.|_|__|-{1,3})[a-z0-9]{1,5}){0,2}(/[a-z0-9]{1,5}){0,3}",
        tag in "[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}",
    ) {
        let name = canonical(&format!("registry.example:443/{path}:{tag}"));
        prop_assert_eq!(name, format!("registry.example:443/{path}:{tag}"));
    }
}
