//! `carrel template`, with the true program and templates that the store made.

#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::fs::{self, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use carrel_store::templates::{Acquired, Point, not_at_all};
use carrel_store::{Store, TemplateKey};
use serde_json::{Value, json};

struct Bed {
    folder: tempfile::TempDir,
}

fn bed() -> Bed {
    Bed { folder: tempfile::tempdir().unwrap() }
}

impl Bed {
    fn home(&self) -> PathBuf {
        self.folder.path().join("home")
    }

    /// A template of an image.
    fn make(&self, image: &str) -> TemplateKey {
        let store = Store::open(&self.home().join("store")).unwrap();
        let key = TemplateKey::of(&json!({ "image": image })).unwrap();
        let Acquired::Make(mut maker) = store.templates().acquire(&key, not_at_all).unwrap() else {
            panic!("there is one of {image}")
        };
        maker.state().unwrap().write_all_at(b"state", 0).unwrap();
        maker.memory(128 << 20).unwrap().write_all_at(&[1; 8192], 4096).unwrap();
        maker.disk(1 << 30).unwrap().write_all_at(&[2; 4096], 0).unwrap();
        maker
            .publish(Point::Unpacked, json!({ "image": image, "domain": "default", "memory_mib": 128 }))
            .unwrap();
        key
    }

    fn run(&self, words: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_carrel"));
        command.args(words).env("CARREL_HOME", self.home()).env_remove("CARREL_LOG").output().unwrap()
    }

    /// What it prints when it succeeds.
    fn said(&self, words: &[&str]) -> String {
        let output = self.run(words);
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, words: &[&str]) -> Value {
        serde_json::from_str(&self.said(words)).unwrap()
    }

    /// Its status and what it says when it fails.
    fn refused(&self, words: &[&str]) -> (Option<i32>, String) {
        let output = self.run(words);
        assert!(!output.status.success(), "{words:?} succeeded");
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    }

    fn damage(&self, key: &TemplateKey) {
        let path = self.home().join("store/templates").join(key.as_str()).join("memory");
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        fs::File::options().write(true).open(path).unwrap().write_all_at(b"!", 64 << 20).unwrap();
    }
}

fn short(key: &TemplateKey) -> &str {
    &key.as_str()[..12]
}

#[test]
fn templates_are_listed_the_last_used_first() {
    let bed = bed();
    assert_eq!(bed.said(&["template", "ls"]).lines().count(), 1, "a header alone");
    assert_eq!(bed.json(&["template", "ls", "--json"]), json!([]));
    let (old, new) = (bed.make("alpine:3.20"), bed.make("debian:12"));
    let table = bed.said(&["template", "ls"]);
    let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["TEMPLATE", "IMAGE", "POINT", "SIZE", "CREATED", "USED", "PINNED"]);
    assert_eq!(rows[1][..3], [short(&new), "debian:12", "unpacked"]);
    assert_eq!(rows[2][..3], [short(&old), "alpine:3.20", "unpacked"]);
    assert_eq!(bed.said(&["template", "ls", "-q"]), format!("{new}\n{old}\n"));
    assert!(bed.said(&["template", "ls", "--keys"]).contains(old.as_str()));
    let all = bed.json(&["template", "ls", "--json"]);
    assert_eq!(all[0]["key"], new.as_str());
    assert_eq!(
        all[1]["description"],
        json!({ "image": "alpine:3.20", "domain": "default", "memory_mib": 128 })
    );
    assert_eq!((&all[1]["status"], &all[1]["damage"]), (&json!("sound"), &Value::Null));
    assert_eq!(all[1]["files"]["memory"]["size_bytes"], 128 << 20);
    assert_eq!(all[1]["size_bytes"], 5 + (128_u64 << 20) + (1 << 30));
    assert!(all[1]["allocated_bytes"].as_u64().unwrap() < 1 << 20);
    assert!(all[1]["created"].as_str().unwrap().ends_with('Z'));
}

#[test]
fn one_is_shown_in_full_by_the_first_digits_of_its_key() {
    let bed = bed();
    let key = bed.make("alpine:3.20");
    let shown = bed.said(&["template", "inspect", short(&key)]);
    for part in [
        key.as_str(),
        "128 MiB, 8 KiB on disk, sparse-sha256:",
        "unpacked",
        "domain",
        "default",
        "alpine:3.20",
    ] {
        assert!(shown.contains(part), "no {part} in:\n{shown}");
    }
    assert_eq!(bed.json(&["template", "inspect", "--json", key.as_str()])[0]["key"], key.as_str());
    for wrong in ["0", "../..", "ffffffffffff", "making"] {
        let (status, said) = bed.refused(&["template", "inspect", wrong]);
        assert_eq!(status, Some(1));
        assert!(
            said.starts_with("carrel: There is no template \"") && said.contains("carrel template ls"),
            "{said}"
        );
    }
}

#[test]
fn what_is_pinned_is_neither_removed_nor_pruned() {
    let bed = bed();
    let (stays, goes) = (bed.make("alpine:3.20"), bed.make("debian:12"));
    assert_eq!(bed.said(&["template", "pin", short(&stays)]), format!("pinned {stays}\n"));
    let (status, said) = bed.refused(&["template", "rm", short(&stays)]);
    assert_eq!(status, Some(1));
    assert!(said.contains("pinned") && said.contains("carrel template unpin"), "{said}");
    let would = bed.json(&["template", "prune", "--all", "--dry-run", "--json"]);
    assert_eq!(would["templates"], json!([goes.as_str()]));
    assert!(
        bed.said(&["template", "prune", "--all"])
            .starts_with(&format!("removed {goes}\nremoved 1 template, "))
    );
    assert_eq!(bed.said(&["template", "unpin", short(&stays)]), format!("unpinned {stays}\n"));
    assert_eq!(bed.said(&["template", "rm", short(&stays)]), format!("removed {stays}\n"));
    assert_eq!(bed.json(&["template", "ls", "--json"]), json!([]));
}

#[test]
fn size_and_age_decide_what_is_pruned() {
    let bed = bed();
    let (old, _new) = (bed.make("alpine:3.20"), bed.make("debian:12"));
    assert!(bed.said(&["template", "prune"]).starts_with("removed 0 templates"));
    assert!(bed.said(&["template", "prune", "--older-than", "1h"]).starts_with("removed 0 templates"));
    let each = bed.json(&["template", "ls", "--json"])[0]["allocated_bytes"].to_string();
    let pruned = bed.json(&["template", "prune", "--max-size", &each, "--json"]);
    assert_eq!(pruned["templates"], json!([old.as_str()]));
    assert_eq!(pruned["freed_bytes"].to_string(), each);
}

#[test]
fn prune_of_everything_takes_templates_too() {
    let bed = bed();
    let key = bed.make("alpine:3.20");
    assert_eq!(bed.json(&["prune", "--json"])["templates"], json!([]));
    assert_eq!(bed.json(&["prune", "--all", "--older-than", "1h", "--json"])["templates"], json!([]));
    let would = bed.said(&["prune", "--all", "--dry-run"]);
    assert!(would.contains(&format!("would remove template {key}\n")), "{would}");
    let pruned = bed.json(&["prune", "--all", "--json"]);
    assert_eq!(pruned["templates"], json!([key.as_str()]));
    assert!(pruned["freed_bytes"].as_u64().unwrap() > 0);
    assert_eq!(bed.json(&["template", "ls", "--json"]), json!([]));
}

#[test]
fn a_damaged_one_is_found_thrown_away_and_the_status_says_so() {
    let bed = bed();
    let (good, bad) = (bed.make("alpine:3.20"), bed.make("debian:12"));
    assert_eq!(bed.said(&["template", "verify", short(&good)]), format!("sound {good}\n"));
    bed.damage(&bad);
    let output = bed.run(&["template", "verify", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let verdicts: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    let of = |key: &TemplateKey| verdicts.iter().find(|verdict| verdict["key"] == key.as_str()).unwrap();
    assert_eq!((&of(&good)["status"], &of(&good)["damage"]), (&json!("sound"), &Value::Null));
    assert_eq!(of(&bad)["status"], "damaged");
    assert!(of(&bad)["damage"].as_str().unwrap().starts_with("Its memory was changed"));
    assert_eq!(bed.said(&["template", "ls", "-q"]), format!("{good}\n"));
    assert_eq!(bed.said(&["template", "verify"]), format!("sound {good}\n"));
}

#[test]
fn the_home_of_another_is_not_touched_by_a_key_that_leads_elsewhere() {
    let bed = bed();
    let victim = bed.folder.path().join("victim");
    fs::create_dir(&victim).unwrap();
    fs::write(victim.join("template.json"), b"{}").unwrap();
    for wrong in ["../../../victim", "/etc", "..", "", "making/../../../../victim"] {
        for command in ["rm", "pin", "unpin", "verify", "inspect"] {
            bed.refused(&["template", command, wrong]);
        }
    }
    assert!(Path::new(&victim).join("template.json").exists());
    assert_eq!(fs::read_dir(&victim).unwrap().count(), 1);
}
