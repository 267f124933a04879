//! What is wrong, hostile or pulled away gives one clear sentence and a documented status, leaves nothing behind (every
//! test's `Carrel` looks when it is dropped), and hurts no other room.

// A test fails by panicking, and so do the functions that tests share.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::time::Instant;

use carrel_tests::functions::{FunctionZip, MEMORY, handlers, python};
use carrel_tests::layout::{Image, LAYER, Layer, Tar, digest};
use carrel_tests::mounted::Mounted;
use carrel_tests::registry::Registry;
use carrel_tests::{Carrel, Done, Running, fixtures, times, wait_for};
use serde_json::{Value, json};

/// Runs an image made for this test; its command says that it ran.
fn run(carrel: &Carrel, image: &Image) -> Done {
    let name = image.write(&carrel.scratch().join("image"));
    carrel.run(&["run", "--cold", &name, "sh", "-c", "echo ran"])
}

fn with_layer(layer: Layer) -> Image {
    Image::new(vec![Layer::plain(Tar::with_shell()), layer])
}

// Images.

#[test]
fn an_image_that_does_not_exist() {
    let carrel = Carrel::cold();
    let registry = Registry::start(&carrel.scratch());
    let missing = format!("{}/no/such:image", registry.address);
    carrel.run(&["run", &missing]).complains(125, &[&missing]);
    carrel.run(&["pull", &missing]).complains(1, &[&missing]);
    carrel.run(&["run", "oci:/no/such/layout"]).complains(125, &["/no/such/layout"]);
    carrel.run(&["run", "oci-archive:/no/such.tar"]).complains(125, &["/no/such.tar"]);
    carrel.run(&["run", "docker-archive:/no/such.tar"]).complains(125, &["/no/such.tar"]);
    carrel.run(&["run", "--pull", "never", "never-pulled:1"]).complains(125, &["never-pulled"]);
    carrel.run(&["run", "NOT A NAME"]).complains(125, &["NOT A NAME"]);
}

#[test]
fn a_registry_that_does_not_answer() {
    let carrel = Carrel::cold();
    carrel.run(&["run", "127.0.0.1:1/name:tag"]).complains(125, &["127.0.0.1:1"]);
}

#[test]
fn a_wrong_digest() {
    let carrel = Carrel::cold();
    let mut layer = Layer::plain(Tar::new().file("a", b"honest"));
    let last = layer.bytes.len() - 2000;
    layer.bytes[last] ^= 1;
    let named = layer.digest.clone();
    run(&carrel, &with_layer(layer)).complains(125, &["digest", &named[..19]]);
}

#[test]
fn of_what_was_refused_nothing_stays_in_the_store() {
    let carrel = Carrel::with_own_store();
    let blobs = || fs::read_dir(carrel.store().join("blobs/sha256")).unwrap().count();
    let good = || Layer::gzip(&Tar::new().file("good", b"honest").bytes());
    // By the host, before anything runs; by the guest, that unpacks it.
    let mut wrong = Layer::plain(Tar::new().file("a", b"honest"));
    *wrong.bytes.last_mut().unwrap() ^= 1;
    let mut lies = good();
    lies.diff_id = digest(b"something else");
    let up = Layer::plain(Tar::new().file("../up", b"hostile"));
    for (what, layer) in [("a wrong digest", wrong), ("another content", lies), ("a way out", up)] {
        let done = run(&carrel, &Image::new(vec![good(), layer]));
        assert_eq!(blobs(), 0, "{what}: {done:?}");
    }
    carrel.run(&["run", &fixtures::busybox(), "true"]).succeeds();
    assert!(blobs() > 0, "what is well stays");
}

#[test]
fn a_configuration_that_lies_about_what_a_layer_unpacks_to() {
    let carrel = Carrel::cold();
    let mut layer = Layer::gzip(&Tar::new().file("a", b"honest").bytes());
    layer.diff_id = digest(b"something else");
    run(&carrel, &with_layer(layer)).complains(125, &["damaged", "the image's configuration says"]);
}

#[test]
fn a_truncated_layer() {
    let carrel = Carrel::cold();
    // Shorter than the manifest says.
    let mut short = Layer::plain(Tar::new().file("a", &[7; 5000]));
    short.bytes.truncate(3000);
    run(&carrel, &with_layer(short)).complains(125, &["size"]);
    // As long as it says, but cut off inside: a digest of half a gzip stream.
    let whole = Layer::gzip(&Tar::new().file("a", &pseudo_random(5000)).bytes());
    let half = whole.bytes[..whole.bytes.len() / 2].to_vec();
    let cut = Layer { digest: digest(&half), size: half.len() as u64, bytes: half, ..whole };
    run(&carrel, &with_layer(cut)).complains(125, &["layer"]);
}

#[test]
fn a_layer_that_is_longer_than_it_says() {
    let carrel = Carrel::cold();
    let mut layer = Layer::plain(Tar::new().file("a", b"honest"));
    layer.size -= 512;
    run(&carrel, &with_layer(layer)).complains(125, &["size"]);
}

#[test]
fn a_layer_that_is_not_what_its_media_type_says() {
    let carrel = Carrel::cold();
    let mut layer = Layer::plain(Tar::new().file("a", b"not gzip"));
    layer.media_type = format!("{LAYER}+gzip");
    run(&carrel, &with_layer(layer)).complains(125, &["layer"]);
}

#[test]
fn an_unknown_media_type() {
    let carrel = Carrel::cold();
    let mut layer = Layer::plain(Tar::new().file("a", b"1"));
    layer.media_type = "application/vnd.example.layer.v9+lzma".into();
    run(&carrel, &with_layer(layer)).complains(125, &["application/vnd.example.layer.v9+lzma"]);
}

#[test]
fn an_image_for_another_architecture() {
    let carrel = Carrel::cold();
    let mut image = with_layer(Layer::plain(Tar::new()));
    image.architecture = "riscv64".into();
    run(&carrel, &image).complains(125, &["riscv64", "amd64"]);
}

#[test]
fn documents_that_are_no_json_or_not_the_expected() {
    let carrel = Carrel::cold();
    let folder = carrel.scratch().join("image");
    let name = with_layer(Layer::plain(Tar::new())).write(&folder);
    let index = fs::read_to_string(folder.join("index.json")).unwrap();
    for wrong in [
        "",
        "{",
        "[]",
        "null",
        r#"{"schemaVersion":2}"#,
        &"[".repeat(100_000),
        &index.replace("sha256:", "sha256:../../"),
    ] {
        fs::write(folder.join("index.json"), wrong).unwrap();
        carrel.run(&["run", &name]).complains(125, &["is no OCI layout", "index.json"]);
    }
}

// Payloads that would escape: refused, or kept inside the root (docs/agent.md, *What would escape*). Each refusal takes a room of its own, so there are
// one or two of a kind here; the agent's own tests, `agent/src/unpack/tests/`, go through all of them.

/// What such a payload writes.
const ESCAPED: &str = "carrel-test-escaped";

/// Runs an image that tries, and returns where in the room the file is then: below its root, on the root's own file system.
fn found(carrel: &Carrel, layers: Vec<Layer>) -> Vec<String> {
    let image = Image::new(layers).write(&carrel.scratch().join("image"));
    let look = format!("echo ran; busybox find / -xdev -name '{ESCAPED}*' | busybox sort");
    let done = carrel.run(&["run", &image, "sh", "-c", &look]).succeeds();
    let mut lines = done.text().lines().map(str::to_owned);
    assert_eq!(lines.next().as_deref(), Some("ran"), "{done:?}");
    lines.collect()
}

/// Layers with a shell below them.
fn above_shell(tar: Tar) -> Vec<Layer> {
    vec![Layer::plain(Tar::with_shell()), Layer::plain(tar)]
}

#[test]
fn a_tar_that_would_escape_by_parent_or_absolute_name() {
    let carrel = Carrel::cold();
    for up in ["../../../../../tmp/", "/../"] {
        let tar = Tar::new().file(&format!("{up}{ESCAPED}"), b"escaped");
        run(&carrel, &with_layer(Layer::plain(tar)))
            .complains(125, &[ESCAPED, "would escape by '..' in its name"]);
    }
    let names = ["/tmp/", "//", "./"].into_iter().enumerate();
    let tar = names.fold(Tar::new(), |tar, (n, name)| tar.file(&format!("{name}{ESCAPED}{n}"), b"escaped"));
    let inside = ["/", "/", "/tmp/"].into_iter().zip([1, 2, 0]);
    let inside: Vec<String> = inside.map(|(folder, n)| format!("{folder}{ESCAPED}{n}")).collect();
    assert_eq!(found(&carrel, above_shell(tar)), inside);
}

#[test]
fn a_tar_that_would_escape_by_symbolic_link() {
    let carrel = Carrel::cold();
    let cases = [
        ("/inner", "/inner"),
        ("../../../../../inner", "/inner"),
        ("/../../inner", "/inner"),
        ("/", ""),
        ("..", ""),
        ("inner/../../..", ""),
        // What is outside in the guest is no place of the image's: it is made, inside.
        ("/room", "/room"),
        ("../room/containers", "/room/containers"),
    ];
    let through = |tar: Tar, n: usize, target: &str| {
        tar.symlink(&format!("way{n}"), target).file(&format!("way{n}/{ESCAPED}{n}"), b"escaped")
    };
    let tar = cases
        .iter()
        .enumerate()
        .fold(Tar::new().directory("inner"), |tar, (n, (target, _))| through(tar, n, target));
    // Below the container's own /proc, where nobody sees it.
    let tar = through(tar, cases.len(), "/proc/1/root");
    let mut inside: Vec<String> =
        cases.iter().enumerate().map(|(n, (_, folder))| format!("{folder}/{ESCAPED}{n}")).collect();
    inside.sort();
    assert_eq!(found(&carrel, above_shell(tar)), inside);
    // Also when the link comes from one layer and the file from the next.
    let lower = Layer::plain(Tar::with_shell().directory("inner").symlink("way", "/../../inner"));
    let upper = Layer::plain(Tar::new().file(&format!("way/{ESCAPED}"), b"escaped"));
    assert_eq!(found(&carrel, vec![lower, upper]), [format!("/inner/{ESCAPED}")]);
}

#[test]
fn a_tar_that_would_escape_by_hard_link() {
    let carrel = Carrel::cold();
    for (target, why) in [
        ("../../../../init", "is a hard link to"),
        ("way/init", "which the image doesn't have"),
        ("out/exe", "which the image doesn't have"),
    ] {
        let tar = Tar::new()
            .symlink("way", "/..")
            .symlink("out", "/proc/1")
            .hard_link(ESCAPED, target)
            .file(ESCAPED, b"overwritten");
        run(&carrel, &with_layer(Layer::plain(tar))).complains(125, &[ESCAPED, why]);
    }
}

#[test]
fn a_tar_whose_whiteouts_would_remove_what_is_outside() {
    let carrel = Carrel::cold();
    for name in ["a/../../.wh.init", ".wh.."] {
        let tar = Tar::new().file(name, b"");
        run(&carrel, &with_layer(Layer::plain(tar))).complains(125, &[name]);
    }
    // Through a link it finds nothing but what is inside.
    let lower =
        Tar::with_shell().directory("inner").file("inner/kept", b"").file(&format!("inner/{ESCAPED}"), b"");
    let upper = Tar::new().symlink("way", "/../../inner").file(&format!("way/.wh.{ESCAPED}"), b"");
    assert_eq!(found(&carrel, vec![Layer::plain(lower), Layer::plain(upper)]), [""; 0]);
}

#[test]
fn a_zip_that_would_escape() {
    let carrel = Carrel::cold();
    let good = || FunctionZip::new().file("bootstrap", "#!/bin/sh\n");
    let up = format!("../{ESCAPED}");
    let absolute = format!("/tmp/{ESCAPED}");
    let below = format!("way/{ESCAPED}");
    for (zip, why) in [
        (good().file(&up, "x"), "'..'"),
        (good().file(&absolute, "x"), "absolute name"),
        (good().link("way", "../../../tmp").file(&below, "x"), "link"),
        // Inside, and all the same: no entry of a zip goes through a link.
        (good().file("inner/a", "x").link("way", "inner").file(&below, "x"), "link"),
    ] {
        let path = zip.write(&carrel.scratch());
        let line = ["invoke", "--zip", path.to_str().unwrap(), "--runtime", "provided", "--timeout", "600s"];
        carrel.run(&line).complains(125, &[ESCAPED, why]);
    }
}

#[test]
fn an_image_that_is_in_the_way_of_what_a_container_needs() {
    let carrel = Carrel::cold();
    for (path, tar) in [
        ("/dev", Tar::new().file("dev", b"")),
        ("/etc", Tar::new().file("etc", b"")),
        ("/etc/hostname", Tar::new().symlink("etc", "/proc/1")),
        ("/etc/hosts", Tar::new().directory("etc").directory("etc/hosts")),
    ] {
        let done = run(&carrel, &with_layer(Layer::plain(tar))).complains(125, &["the image", path]);
        assert!(!done.errors().contains("guest failed"), "{done:?}");
    }
}

// Bombs. The caps are those of docs/cli.md.

#[test]
fn a_bomb_by_size() {
    let carrel = Carrel::cold();
    // Said by the header alone.
    let claimed = Tar::new().claim("huge", 1 << 50);
    run(&carrel, &with_layer(Layer::plain(claimed)))
        .complains(125, &["exceeds 10737418240 bytes", "1125899906842624 bytes"]);
    // Really unpacked: 128 MiB of zeros in an eighth of a megabyte, in a room whose disk takes half.
    let zeros = Layer::gzip(&Tar::new().file("zeros", &vec![0; 128 << 20]).bytes());
    let name = with_layer(zeros).write(&carrel.scratch().join("bomb"));
    carrel.run(&["run", "--disk", "64m", &name]).complains(125, &["exceeds 67108864 bytes"]);
}

#[test]
fn a_bomb_by_nesting() {
    let carrel = Carrel::cold();
    let mut image = with_layer(Layer::plain(Tar::new()));
    image.nesting = 200;
    run(&carrel, &image).complains(125, &["more than 4 deep"]);
    // A thousand layers.
    let layers = (0..1000).map(|n| Layer::plain(Tar::new().file("n", n.to_string().as_bytes()))).collect();
    run(&carrel, &Image::new(layers)).complains(125, &["1000 layers", "128 is the most"]);
}

#[test]
fn a_zip_bomb() {
    let carrel = Carrel::cold();
    let path = FunctionZip::new()
        .file("bootstrap", "#!/bin/sh\n")
        .file("zeros", vec![0; 350 << 20])
        .write(&carrel.scratch());
    let line = ["invoke", "--zip", path.to_str().unwrap(), "--runtime", "provided", "--timeout", "600s"];
    // A function's 250 MiB, and 96 for the runtime that lies below it.
    carrel.run(&line).complains(125, &["exceeds 362807296 bytes"]);
}

// A neighbour.

#[test]
fn a_room_that_runs_beside_bad_input_goes_on_at_its_pace() {
    let carrel = Carrel::cold();
    let script = "n=0; while :; do n=$((n + 1)); echo beat $n; sleep 0.5; done";
    carrel.detach(&["--name", "neighbour", "-m", "128m", &fixtures::busybox(), "sh", "-c", script]);
    carrel.wait_for_log("neighbour", "beat 1");
    let beats = || carrel.run(&["logs", "neighbour"]).succeeds().text().lines().count();
    let mut last = beats();
    let mut beside = |what: &str, status: i32, bad: &dyn Fn() -> Done| {
        let begun = Instant::now();
        let done = bad();
        assert_eq!(done.status, status, "{what}: {done:?}");
        // It beats twice a second; a tenth of that is asked for, since a bomb takes its part of the CPUs.
        let now = wait_for("the neighbour's next beat", || Some(beats()).filter(|now| *now > last));
        let least = begun.elapsed().as_secs() / 5;
        assert!(
            u64::try_from(now - last).unwrap() >= least,
            "{what}: {} beats in {:?}",
            now - last,
            begun.elapsed()
        );
        last = now;
    };
    let scratch = carrel.scratch();
    let image = |name: &str, layers: Vec<Layer>| Image::new(layers).write(&scratch.join(name));
    let shell = || Layer::plain(Tar::with_shell());

    let mut lying = Layer::gzip(&Tar::new().file("a", b"honest").bytes());
    lying.diff_id = digest(b"something else");
    let lying = image("lying", vec![shell(), lying]);
    beside("a lying layer", 125, &|| carrel.run(&["run", &lying, "true"]));
    let zeros = Layer::gzip(&Tar::new().file("zeros", &vec![0; 96 << 20]).bytes());
    let bomb = image("bomb", vec![shell(), zeros]);
    beside("a bomb", 125, &|| carrel.run(&["run", "--disk", "64m", &bomb, "true"]));
    let escaping = FunctionZip::new().file("../escaped", "x").write(&scratch);
    let line = ["invoke", "--zip", escaping.to_str().unwrap(), "--runtime", "provided"];
    beside("a zip that would escape", 125, &|| carrel.run(&line));
    beside("a bad user", 125, &|| carrel.run(&["run", "-u", "nobody-here", &fixtures::busybox(), "true"]));
    beside("an image that is not there", 125, &|| carrel.run(&["run", "oci:/no/such/layout"]));
    let mut wrong = Layer::plain(Tar::new().file("a", b"honest"));
    *wrong.bytes.last_mut().unwrap() ^= 1;
    let wrong = image("wrong", vec![shell(), wrong]);
    beside("a wrong digest", 125, &|| carrel.run(&["run", &wrong, "true"]));
    let up = image("up", vec![shell(), Layer::plain(Tar::new().file("../up", b"hostile"))]);
    beside("a tar that would escape", 125, &|| carrel.run(&["run", &up, "true"]));
    // Under emulation minutes of headers: the agent's own tests count to a million each time.
    if times(0, 1) > 0 {
        // The same header over and over: a whiteout of nothing is the cheapest entry, and an entry all the same.
        let many = Tar::new().file(".wh.x", b"").bytes()[..512].repeat(1_000_001);
        let many = image("many", vec![shell(), Layer::gzip(&many)]);
        beside("a bomb by entries", 125, &|| {
            carrel.run(&["run", &many, "true"]).complains(125, &["more than 1000000 entries"])
        });
    }
    beside("a missing command", 127, &|| carrel.run(&["run", &fixtures::busybox(), "no-such-command"]));
    beside("a runtime that exits", 3, &|| bootstrap(&carrel, "#!/bin/sh\nexit 4\n", "5s"));
    beside("a runtime that hangs", 124, &|| bootstrap(&carrel, "#!/bin/sh\nsleep 1000\n", "2s"));
    let small = Mounted::tmpfs(&scratch.join("small"), "24m");
    beside("a host out of disk", 125, &|| {
        Running::spawn(&mut carrel.command_in(small.path(), &["run", &fixtures::image("debian"), "true"]))
            .done()
    });
    assert_eq!(carrel.run(&["exec", "neighbour", "echo", "well"]).succeeds().text(), "well\n");
    carrel.run(&["kill", "neighbour"]).succeeds();
}

// Requests.

#[test]
fn a_missing_command() {
    let carrel = Carrel::new();
    carrel.run(&["run", &fixtures::busybox(), "no-such-command"]).complains(127, &["no-such-command"]);
    // An image that names none, and nobody else does.
    let mut image = Image::new(vec![Layer::plain(Tar::with_shell())]);
    image.config = json!({});
    let name = image.write(&carrel.scratch().join("image"));
    carrel.run(&["run", "--cold", &name]).complains(125, &["command"]);
}

#[test]
fn a_bad_user() {
    let carrel = Carrel::new();
    for user in ["nobody-here", "reader:no-such-group", "99999999999"] {
        carrel.run(&["run", "-u", user, &fixtures::busybox(), "true"]).complains(125, &["user"]);
    }
}

#[test]
fn memory_below_what_the_guest_needs() {
    let carrel = Carrel::cold();
    carrel.run(&["run", "-m", "8m", &fixtures::busybox(), "true"]).complains(125, &["64 MiB"]);
    // In range, but too little for what runs: in small pieces, so that the kernel finds out when they are used.
    let script = "x = [bytearray(b'x') * (1 << 20) for _ in range(200)]";
    carrel
        .run(&["run", "-m", "64m", &fixtures::image("debian"), "python3", "-c", script])
        .complains(137, &["out of memory", "--memory"]);
}

#[test]
fn an_event_that_is_not_json() {
    let carrel = Carrel::cold();
    let zip = python(&carrel.scratch(), "def handler(event, context):\n    return 1\n");
    let invoke =
        |event: &str| carrel.run(&["invoke", "--zip", &zip, "--handler", "app.handler", "--event", event]);
    invoke("{not json").complains(125, &["event", "JSON"]);
    invoke("").complains(125, &["event", "JSON"]);
    invoke("@/no/such/event.json").complains(125, &["/no/such/event.json"]);
}

#[test]
fn a_handler_that_does_not_exist() {
    let carrel = Carrel::new();
    let zip = handlers(&carrel.scratch());
    let line = ["invoke", "--zip", &zip, "--handler", "app.nobody", "--memory", MEMORY, "--timeout", "600s"];
    let done = carrel.run(&line).ends_with(3);
    assert!(done.errors().contains("carrel: ") && done.text().contains("HandlerNotFound"), "{done:?}");
    // A custom runtime without its program.
    let zip = FunctionZip::new().file("readme", "no bootstrap").write(&carrel.scratch());
    let done = carrel.run(&["invoke", "--cold", "--zip", zip.to_str().unwrap(), "--runtime", "provided"]);
    let done = done.ends_with(3);
    assert!(done.text().contains("Runtime.InvalidEntrypoint"), "{done:?}");
}

/// Invokes a `provided` function whose bootstrap is this shell script.
fn bootstrap(carrel: &Carrel, script: &str, timeout: &str) -> Done {
    let zip = FunctionZip::new().file_with_mode("bootstrap", script, 0o755).write(&carrel.scratch());
    carrel.run(&["invoke", "--zip", zip.to_str().unwrap(), "--runtime", "provided", "--timeout", timeout])
}

fn error_type(done: &Done) -> Value {
    let answer: Value =
        serde_json::from_slice(&done.stdout).unwrap_or_else(|error| panic!("{error}: {done:?}"));
    answer["errorType"].clone()
}

#[test]
fn a_runtime_that_exits() {
    let carrel = Carrel::cold();
    let done = bootstrap(&carrel, "#!/bin/sh\nexit 4\n", "5s").ends_with(3);
    assert_eq!(error_type(&done), "Runtime.ExitError");
    assert!(done.text().contains("exit status 4"), "{done:?}");
}

#[test]
fn a_runtime_that_hangs() {
    let carrel = Carrel::cold();
    // It never asks for its event: INIT's ten seconds, then the timeout.
    let done = bootstrap(&carrel, "#!/bin/sh\nsleep 1000\n", "2s").ends_with(124);
    assert_eq!(error_type(&done), "Sandbox.Timedout");
}

#[test]
fn a_runtime_that_answers_too_much() {
    let carrel = Carrel::new();
    let zip = handlers(&carrel.scratch());
    let line =
        ["invoke", "--zip", &zip, "--handler", "app.too_large", "--memory", MEMORY, "--timeout", "600s"];
    let done = carrel.run(&line).ends_with(4);
    assert_eq!(error_type(&done), "Function.ResponseSizeTooLarge");
}

// The rug pulled away: see also rooms.rs for killed VMMs, commands and owners.

#[test]
fn a_host_out_of_disk() {
    let carrel = Carrel::cold();
    let small = Mounted::tmpfs(&carrel.scratch().join("small"), "24m");
    let image = fixtures::image("debian");
    let with = |arguments: &[&str]| Running::spawn(&mut carrel.command_in(small.path(), arguments)).done();
    with(&["pull", &image]).complains(1, &["space"]);
    // What was begun is gone, so that something smaller still fits.
    let done = with(&["run", &fixtures::busybox(), "echo", "fits"]).succeeds();
    assert_eq!(done.text(), "fits\n");
    // A room that writes more than the host has left sees an I/O error; carrel says why.
    let script = "dd if=/dev/zero of=/work/fill bs=1M count=64; sync; echo went on";
    let done = with(&["run", &fixtures::busybox(), "sh", "-c", script]).succeeds();
    assert_eq!(done.text(), "went on\n");
    let warns = |line: &&str| line.contains(" WARN The host has no space left on the disk that holds ");
    assert_eq!(done.errors().lines().filter(warns).count(), 1, "{done:?}");
}

#[test]
fn a_home_without_a_byte_left() {
    let carrel = Carrel::cold();
    let small = Mounted::tmpfs(&carrel.scratch().join("full"), "24m");
    let with = |arguments: &[&str]| Running::spawn(&mut carrel.command_in(small.path(), arguments)).done();
    let image = fixtures::busybox();
    let script = "echo begun; while :; do echo line; sleep 0.1; done";
    with(&["run", "-d", "--name", "desk", &image, "sh", "-c", script]).succeeds();
    wait_for("the room's log", || with(&["logs", "desk"]).text().contains("begun").then_some(()));
    let fill = small.path().join("fill");
    let mut file = fs::File::create(&fill).unwrap();
    for size in [1 << 20, 4096, 1] {
        while std::io::Write::write_all(&mut file, &vec![1; size]).is_ok() {}
    }
    // The room that is there goes on, heeds every command, and ends with a record.
    assert!(with(&["ps"]).succeeds().text().contains("desk"));
    assert_eq!(with(&["exec", "desk", "echo", "well"]).succeeds().text(), "well\n");
    with(&["stats", "--no-stream"]).succeeds();
    with(&["run", &image, "true"]).complains(125, &["space"]);
    with(&["run", "-d", &image, "true"]).complains(125, &["space"]);
    with(&["stop", "-t", "0", "desk"]).succeeds();
    assert!(with(&["logs", "desk"]).succeeds().text().contains("begun"));
    let rooms: Value = serde_json::from_str(with(&["ps", "-a", "--json"]).succeeds().text()).unwrap();
    assert_eq!((rooms[0]["state"].as_str(), rooms[1].as_object()), (Some("exited"), None), "{rooms:#}");
    with(&["rm", "desk"]).succeeds();
    fs::remove_file(&fill).unwrap();
    drop(file);
    assert_eq!(with(&["run", &image, "echo", "fits"]).succeeds().text(), "fits\n");
}

#[test]
fn a_usage_report_that_has_no_space() {
    let carrel = Carrel::new();
    let file = "/dev/full";
    let line = ["run", "--usage-file", file, &fixtures::busybox(), "echo", "ran"];
    let done = carrel.run(&line).complains(125, &[file, "space"]);
    assert_eq!(done.text(), "ran\n");
    // Nobody can be told, and the status says it alone.
    let mut command = carrel.command(&["run", &fixtures::busybox(), "sh", "-c", "echo ran; exit 3"]);
    let full = || fs::OpenOptions::new().write(true).open(file).unwrap();
    Running::spawn(command.stdout(full()).stderr(full())).done().ends_with(3);
    let mut command = carrel.command(&["run", "--pull", "never", "no-such-image:1"]);
    Running::spawn(command.stdout(full()).stderr(full())).done().ends_with(125);
}

/// Bytes that don't compress.
fn pseudo_random(length: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[0]
    };
    (0..length).map(|_| next()).collect()
}
