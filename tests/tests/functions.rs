//! `carrel invoke`: real runtime clients, one event, and every way in which that can end.

// A test fails by panicking, and so do the functions that tests share.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::Read;
use std::path::Path;

use carrel_tests::functions::{FunctionZip, MEMORY, handlers, python};
use carrel_tests::layout::{Image, Layer, Tar};
use carrel_tests::{Carrel, Done, fixtures};
use serde_json::{Value, json};

fn invoke(carrel: &Carrel, handler: &str, event: &str, more: &[&str]) -> Done {
    let zip = handlers(&carrel.scratch());
    let line = ["invoke", "--zip", &zip, "--runtime", "python3.11", "--memory", MEMORY, "--timeout", "600s"];
    carrel.run(&[&line[..], &["--handler", handler, "--event", event], more].concat())
}

fn answer(done: &Done) -> Value {
    serde_json::from_slice(&done.stdout).unwrap_or_else(|error| panic!("no JSON: {error}\n{done:?}"))
}

/// The value of a field of the REPORT line.
fn report(done: &Done, field: &str) -> Option<String> {
    let line = done.errors().lines().find(|line| line.starts_with("REPORT RequestId: "))?;
    line.split('\t').find_map(|part| part.strip_prefix(&format!("{field}: "))).map(str::to_owned)
}

fn rust_bootstrap() -> String {
    fixtures::path("rust-bootstrap").join("bootstrap.zip").to_str().unwrap().to_owned()
}

#[test]
fn a_python_function_answers_and_logs_as_on_lambda() {
    let carrel = Carrel::new();
    let done =
        invoke(&carrel, "app.answers", r#"{"n": 1}"#, &["--env", "A=1", "--name", "answers"]).succeeds();
    let got = answer(&done);
    assert_eq!(got["event"], json!({ "n": 1 }));
    assert_eq!(
        (&got["name"], &got["handler"], &got["a"]),
        (&json!("answers"), &json!("app.answers"), &json!("1"))
    );
    assert_eq!(got["memory"].to_string().trim_matches('"'), "512");
    assert!((1..=600_000).contains(&got["left"].as_i64().unwrap()), "{got}");
    assert_ne!(got["uid"], json!(0), "functions are no root");
    assert_eq!((&got["engine"], &got["task"]), (&json!("AWS_Lambda_python3.11"), &json!("/var/task")));
    let trace = got["trace"].as_str().unwrap();
    assert!(trace.starts_with("Root=1-") && trace.ends_with(";Sampled=0"), "{trace}");
    let id = got["id"].as_str().unwrap();
    let log = done.errors();
    for line in [format!("START RequestId: {id} Version: $LATEST"), format!("END RequestId: {id}")] {
        assert!(log.lines().any(|found| found == line), "no '{line}': {done:?}");
    }
    assert!(log.contains("to the log") && log.contains("to stderr"), "{done:?}");
    for field in ["Duration", "Billed Duration", "Init Duration", "Max Memory Used"] {
        assert!(report(&done, field).is_some(), "no {field}: {done:?}");
    }
    assert_eq!(report(&done, "Memory Size").as_deref(), Some("512 MB"));
}

#[test]
fn the_event_comes_from_a_file_or_standard_input_too() {
    let carrel = Carrel::new();
    let file = carrel.scratch().join("event.json");
    std::fs::write(&file, r#"{"n": 41}"#).unwrap();
    let done = invoke(&carrel, "app.adds", &format!("@{}", file.display()), &[]).succeeds();
    assert_eq!(done.text().trim(), "42");
    let zip = handlers(&carrel.scratch());
    let line = ["invoke", "--zip", &zip, "--handler", "app.adds", "--memory", MEMORY, "--timeout", "600s"];
    let done = carrel.run_with_input(&[&line[..], &["--event", "-"]].concat(), br#"{"n": 6}"#).succeeds();
    assert_eq!(done.text().trim(), "7");
}

#[test]
fn an_exception_is_the_functions_error() {
    let carrel = Carrel::new();
    let done = invoke(&carrel, "app.raises", "{}", &[]).ends_with(1);
    let error = answer(&done);
    assert_eq!((&error["errorType"], &error["errorMessage"]), (&json!("ValueError"), &json!("not today")));
    assert!(error["stackTrace"].is_array(), "{error}");
    assert!(report(&done, "Duration").is_some(), "{done:?}");
}

#[test]
fn a_rust_bootstrap_answers_under_the_runtime_provided() {
    let carrel = Carrel::new();
    let zip = rust_bootstrap();
    let line = ["invoke", "--zip", &zip, "--runtime", "provided", "--timeout", "600s", "--name", "rusty"];
    let done = carrel.run(&[&line[..], &["--event", r#"{"n": 1}"#]].concat()).succeeds();
    let got = answer(&done);
    assert_eq!((&got["event"], &got["function"]), (&json!({ "n": 1 }), &json!("rusty")));
    assert!((1..=600_000).contains(&got["milliseconds_left"].as_i64().unwrap()), "{got}");
    let error = carrel.run(&[&line[..], &["--event", r#"{"do": "error"}"#]].concat()).ends_with(1);
    assert_eq!(answer(&error)["errorMessage"], json!("the function refuses"));
}

#[test]
fn an_image_is_a_function_too() {
    let carrel = Carrel::cold();
    let zip = std::fs::File::open(rust_bootstrap()).unwrap();
    let mut program = Vec::new();
    zip::ZipArchive::new(zip).unwrap().by_name("bootstrap").unwrap().read_to_end(&mut program).unwrap();
    let tar = Tar::new().directory("srv").file_with_mode("srv/function", &program, 0o755);
    let mut image = Image::new(vec![Layer::gzip(&tar.bytes())]);
    image.config = json!({ "Entrypoint": ["/srv/function"], "User": "root", "WorkingDir": "/srv" });
    let name = image.write(&carrel.scratch().join("image"));
    let line = ["invoke", "--image", &name, "--timeout", "600s", "--name", "pictured", "--event", "[3]"];
    let done = carrel.run(&line).succeeds();
    let got = answer(&done);
    assert_eq!((&got["event"], &got["function"]), (&json!([3]), &json!("pictured")));
    assert!(report(&done, "Duration").is_some() && !done.errors().contains("INIT_START"), "{done:?}");
    // It has no directory for temporary files: it gets one all the same, and nothing else to write to.
    image.config = json!({ "Entrypoint": ["/srv/nothing"] });
    let name = image.write(&carrel.scratch().join("broken"));
    let done = carrel.run(&["invoke", "--image", &name]).ends_with(3);
    assert_eq!(answer(&done)["errorType"], json!("Runtime.InvalidEntrypoint"));
    assert_eq!(report(&done, "Error Type").as_deref(), Some("Runtime.InvalidEntrypoint"));
}

#[test]
fn a_streamed_response_arrives_whole_though_it_is_larger() {
    let carrel = Carrel::new();
    let done = invoke(&carrel, "app.streams", r#"{"pieces": 8}"#, &[]).succeeds();
    assert_eq!(done.stdout.len(), 8 << 20);
    assert!(done.stdout.iter().all(|byte| *byte == b'x'));
}

#[test]
fn a_function_that_takes_too_long_times_out() {
    let carrel = Carrel::new();
    let zip = rust_bootstrap();
    let line =
        ["invoke", "--zip", &zip, "--runtime", "provided", "--timeout", "2s", "--event", r#"{"do": "hang"}"#];
    let done = carrel.run(&line).ends_with(124);
    let error = answer(&done);
    assert_eq!(error["errorType"], json!("Sandbox.Timedout"));
    assert!(
        error["errorMessage"].as_str().unwrap().ends_with("Error: Task timed out after 2.00 seconds"),
        "{error}"
    );
    assert_eq!(report(&done, "Status").as_deref(), Some("timeout"));
}

#[test]
fn a_runtime_that_exits_is_named_with_its_status() {
    let carrel = Carrel::new();
    let zip = rust_bootstrap();
    let line = ["invoke", "--zip", &zip, "--runtime", "provided", "--timeout", "600s"];
    let done = carrel.run(&[&line[..], &["--event", r#"{"do": "exit"}"#]].concat()).ends_with(3);
    let error = answer(&done);
    assert_eq!(error["errorType"], json!("Runtime.ExitError"));
    let message = error["errorMessage"].as_str().unwrap();
    assert!(message.ends_with("Error: Runtime exited with error: exit status 9"), "{message}");
    assert_eq!(report(&done, "Status").as_deref(), Some("error"));
    assert_eq!(report(&done, "Error Type").as_deref(), Some("Runtime.ExitError"));
    let done = carrel.run(&[&line[..], &["--event", r#"{"do": "abort"}"#]].concat()).ends_with(3);
    let message = answer(&done)["errorMessage"].as_str().unwrap().to_owned();
    assert!(message.ends_with("Error: Runtime exited with error: signal: aborted"), "{message}");
}

#[test]
fn a_handler_or_module_that_does_not_exist_is_an_import_error() {
    let carrel = Carrel::new();
    for (handler, kind) in
        [("app.nobody", "Runtime.HandlerNotFound"), ("nowhere.handler", "Runtime.ImportModuleError")]
    {
        let done = invoke(&carrel, handler, "{}", &[]).ends_with(3);
        assert_eq!(answer(&done)["errorType"], json!(kind), "{done:?}");
    }
}

#[test]
fn a_response_that_is_too_large_is_refused() {
    let carrel = Carrel::new();
    let done = invoke(&carrel, "app.too_large", "{}", &[]).ends_with(4);
    assert_eq!(answer(&done)["errorType"], json!("Function.ResponseSizeTooLarge"));
}

#[test]
fn a_function_that_needs_too_much_memory_is_told_so() {
    let carrel = Carrel::cold();
    let zip = rust_bootstrap();
    let event = r#"{"do": "fill memory"}"#;
    let line = ["invoke", "--zip", &zip, "--runtime", "provided", "--timeout", "600s", "--memory", "128m"];
    let done = carrel.run(&[&line[..], &["--event", event]].concat()).ends_with(3);
    let error = answer(&done);
    assert_eq!(error["errorType"], json!("Runtime.OutOfMemory"), "{error}");
    let message = error["errorMessage"].as_str().unwrap();
    assert!(message.ends_with("Error: Runtime exited with error: signal: killed"), "{message}");
    assert_eq!(report(&done, "Status").as_deref(), Some("error"));
    assert_eq!(report(&done, "Error Type").as_deref(), Some("Runtime.OutOfMemory"));
    // All that it had was used: "NNN MB".
    let used = report(&done, "Max Memory Used").unwrap();
    let used: u32 = used.strip_suffix(" MB").unwrap().parse().unwrap();
    assert!((64..=128).contains(&used), "{used}");
}

#[test]
fn code_is_read_only_and_tmp_is_not() {
    let carrel = Carrel::new();
    let done = invoke(&carrel, "app.writes", "{}", &[]).succeeds();
    let got = answer(&done);
    assert!([json!(30), json!(13)].contains(&got[0]), "{got}");
    assert_eq!((&got[1], &got[2]), (&json!(true), &json!("app.py")));
}

#[test]
fn nobody_becomes_root_in_a_function() {
    let carrel = Carrel::cold();
    let script = "#!/bin/sh\n\
        while read -r _ at _ options _; do test \"$at\" != / || echo \"root is $options\" >&2; done </proc/mounts\n\
        exit 4\n";
    let zip = FunctionZip::new().file_with_mode("bootstrap", script, 0o755).write(&carrel.scratch());
    let done = carrel.run(&["invoke", "--zip", zip.to_str().unwrap(), "--runtime", "provided"]).ends_with(3);
    let errors = done.errors();
    let root = errors.lines().find_map(|line| Some(line.split_once("root is ")?.1));
    let root = root.unwrap_or_else(|| panic!("{done:?}"));
    assert!(root.split(',').any(|option| option == "nosuid"), "{done:?}");
}

#[test]
fn two_functions_at_once_do_not_see_each_other() {
    let carrel = Carrel::new();
    let zip = rust_bootstrap();
    let start = |n: &str| {
        let event = format!("{{\"n\": {n}}}");
        carrel.start(&[
            "invoke",
            "--zip",
            &zip,
            "--runtime",
            "provided",
            "--timeout",
            "600s",
            "--event",
            &event,
        ])
    };
    let both = [("1", start("1")), ("2", start("2"))];
    for (n, running) in both {
        let done = running.done().succeeds();
        assert_eq!(answer(&done)["event"]["n"].to_string(), n);
        assert!(!done.errors().contains(&format!("{{\"n\":{}}}", 3 - n.parse::<i32>().unwrap())), "{done:?}");
    }
}

#[test]
fn a_zip_that_is_missing_or_none_is_named() {
    let carrel = Carrel::cold();
    carrel.run(&["invoke", "--zip", "/no/such.zip", "--handler", "a.b"]).complains(125, &["/no/such.zip"]);
    let file = carrel.scratch().join("not.zip");
    std::fs::write(&file, "plain text").unwrap();
    let path = file.to_str().unwrap();
    carrel.run(&["invoke", "--zip", path, "--handler", "a.b"]).complains(125, &["zip"]);
    carrel
        .run(&["invoke", "--zip", path, "--handler", "a.b", "--runtime", "cobol1.0"])
        .complains(125, &["cobol1.0"]);
    assert!(Path::new(path).exists(), "it is the user's file");
}

/// Counts what it shares with events before, and ends as its event says.
const COUNTING: &str = "
import os
count = 0
def handler(event, context):
    global count
    count += 1
    was_here = os.path.exists('/tmp/here')
    open('/tmp/here', 'w').close()
    if event == 'fail':
        raise ValueError('no')
    if event == 'end':
        os._exit(9)
    return {'event': event, 'count': count, 'was_here': was_here}
";

/// The responses to several events, a line each.
fn answers(carrel: &Carrel, events: &str, more: &[&str], status: i32) -> (Vec<Value>, Done) {
    let zip = python(&carrel.scratch(), COUNTING);
    let file = carrel.scratch().join("events.jsonl");
    std::fs::write(&file, events).unwrap();
    let line = ["invoke", "--zip", &zip, "--handler", "app.handler", "--timeout", "600s", "--events"];
    let done = carrel.run(&[&line[..], &[file.to_str().unwrap()], more].concat()).ends_with(status);
    let lines =
        done.text().lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{done:?}")));
    (lines.collect(), done)
}

fn starts(done: &Done) -> usize {
    done.errors().lines().filter(|line| line.starts_with("START RequestId: ")).count()
}

#[test]
fn events_share_a_room_as_long_as_its_runtime_lives() {
    let carrel = Carrel::new();
    let (said, done) = answers(&carrel, "1\n2\n\n\"fail\"\n\"end\"\n3\n", &[], 1);
    assert_eq!(said[0], json!({"event": 1, "count": 1, "was_here": false}));
    assert_eq!(said[1], json!({"event": 2, "count": 2, "was_here": true}));
    assert_eq!(said[2]["errorType"], json!("ValueError"));
    assert_eq!(said[3]["errorType"], json!("Runtime.ExitError"));
    assert_eq!(said[4], json!({"event": 3, "count": 1, "was_here": false}), "in a new room");
    assert_eq!((said.len(), starts(&done)), (5, 5));
    let ids: std::collections::BTreeSet<&str> = done
        .errors()
        .lines()
        .filter_map(|line| line.strip_prefix("REPORT RequestId: ")?.split('\t').next())
        .collect();
    assert_eq!(ids.len(), 5, "{done:?}");
    assert_eq!(done.errors().matches("INIT_START").count(), 2, "{done:?}");
}

#[test]
fn isolated_events_share_nothing_and_initialised_ones_no_init() {
    let carrel = Carrel::with_own_store();
    let (said, done) = answers(&carrel, "1\n2\n3\n", &["--isolation", "event", "--initialised"], 0);
    for (n, said) in said.iter().enumerate() {
        assert_eq!(*said, json!({"event": n + 1, "count": 1, "was_here": false}));
    }
    assert_eq!((said.len(), starts(&done)), (3, 3));
    assert_eq!(done.errors().matches("RESTORE_START").count(), 3, "{done:?}");
    assert!(!done.errors().contains("Init Duration"), "{done:?}");
}
