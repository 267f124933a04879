//! `carrel invoke`: real runtime clients, one event, and every way in which that can end.

// A test fails by panicking, and so do the functions that tests share.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::Read;
use std::path::Path;

use carrel_tests::functions::{FunctionZip, python};
use carrel_tests::layout::{Image, Layer, Tar};
use carrel_tests::{Carrel, Done, fixtures};
use serde_json::{Value, json};

fn invoke(carrel: &Carrel, source: &str, event: &str, more: &[&str]) -> Done {
    let zip = python(&carrel.scratch(), source);
    let line =
        ["invoke", "--zip", &zip, "--runtime", "python3.11", "--handler", "app.handler", "--event", event];
    carrel.run(&[&line[..], more].concat())
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
    let source = "import os, sys\n\
        def handler(event, context):\n\
        \x20   print('to the log')\n\
        \x20   print('to stderr', file=sys.stderr)\n\
        \x20   return {'event': event, 'name': context.function_name, 'memory': context.memory_limit_in_mb,\n\
        \x20           'left': context.get_remaining_time_in_millis(), 'id': context.aws_request_id,\n\
        \x20           'handler': os.environ['_HANDLER'], 'a': os.environ['A'], 'uid': os.getuid(),\n\
        \x20           'engine': os.environ['AWS_EXECUTION_ENV'], 'task': os.environ['LAMBDA_TASK_ROOT'],\n\
        \x20           'trace': os.environ['_X_AMZN_TRACE_ID']}\n";
    let more = ["--env", "A=1", "--memory", "256m", "--timeout", "60s", "--name", "answers"];
    let done = invoke(&carrel, source, r#"{"n": 1}"#, &more).succeeds();
    let got = answer(&done);
    assert_eq!(got["event"], json!({ "n": 1 }));
    assert_eq!(
        (&got["name"], &got["handler"], &got["a"]),
        (&json!("answers"), &json!("app.handler"), &json!("1"))
    );
    assert_eq!(got["memory"].to_string().trim_matches('"'), "256");
    assert!((1..=60_000).contains(&got["left"].as_i64().unwrap()), "{got}");
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
    assert_eq!(report(&done, "Memory Size").as_deref(), Some("256 MB"));
}

#[test]
fn the_event_comes_from_a_file_or_standard_input_too() {
    let carrel = Carrel::new();
    let source = "def handler(event, context):\n    return event['n'] + 1\n";
    let file = carrel.scratch().join("event.json");
    std::fs::write(&file, r#"{"n": 41}"#).unwrap();
    let done = invoke(&carrel, source, &format!("@{}", file.display()), &["--timeout", "60s"]).succeeds();
    assert_eq!(done.text().trim(), "42");
    let zip = python(&carrel.scratch(), source);
    let line = ["invoke", "--zip", &zip, "--handler", "app.handler", "--timeout", "60s", "--event", "-"];
    let done = carrel.run_with_input(&line, br#"{"n": 6}"#).succeeds();
    assert_eq!(done.text().trim(), "7");
}

#[test]
fn an_exception_is_the_functions_error() {
    let carrel = Carrel::new();
    let source = "def handler(event, context):\n    raise ValueError('not today')\n";
    let done = invoke(&carrel, source, "{}", &["--timeout", "60s"]).ends_with(1);
    let error = answer(&done);
    assert_eq!((&error["errorType"], &error["errorMessage"]), (&json!("ValueError"), &json!("not today")));
    assert!(error["stackTrace"].is_array(), "{error}");
    assert!(report(&done, "Duration").is_some(), "{done:?}");
}

#[test]
fn a_rust_bootstrap_answers_under_the_runtime_provided() {
    let carrel = Carrel::new();
    let zip = rust_bootstrap();
    let line = ["invoke", "--zip", &zip, "--runtime", "provided", "--timeout", "30s", "--name", "rusty"];
    let done = carrel.run(&[&line[..], &["--event", r#"{"n": 1}"#]].concat()).succeeds();
    let got = answer(&done);
    assert_eq!((&got["event"], &got["function"]), (&json!({ "n": 1 }), &json!("rusty")));
    assert!((1..=30_000).contains(&got["milliseconds_left"].as_i64().unwrap()), "{got}");
    let error = carrel.run(&[&line[..], &["--event", r#"{"do": "error"}"#]].concat()).ends_with(1);
    assert_eq!(answer(&error)["errorMessage"], json!("the function refuses"));
}

#[test]
fn an_image_is_a_function_too() {
    let carrel = Carrel::new();
    let zip = std::fs::File::open(rust_bootstrap()).unwrap();
    let mut program = Vec::new();
    zip::ZipArchive::new(zip).unwrap().by_name("bootstrap").unwrap().read_to_end(&mut program).unwrap();
    let tar = Tar::new().directory("srv").file_with_mode("srv/function", &program, 0o755);
    let mut image = Image::new(vec![Layer::gzip(&tar.bytes())]);
    image.config = json!({ "Entrypoint": ["/srv/function"], "User": "root", "WorkingDir": "/srv" });
    let name = image.write(&carrel.scratch().join("image"));
    let line = ["invoke", "--image", &name, "--timeout", "30s", "--name", "pictured", "--event", "[3]"];
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
    // The published client doesn't stream, so the function itself does.
    let source = "import http.client, os, time\n\
        def handler(event, context):\n\
        \x20   client = http.client.HTTPConnection(os.environ['AWS_LAMBDA_RUNTIME_API'])\n\
        \x20   def body():\n\
        \x20       for n in range(event['pieces']):\n\
        \x20           yield b'x' * (1 << 20)\n\
        \x20   path = '/2018-06-01/runtime/invocation/' + context.aws_request_id + '/response'\n\
        \x20   headers = {'Lambda-Runtime-Function-Response-Mode': 'streaming', 'Transfer-Encoding': 'chunked'}\n\
        \x20   client.request('POST', path, body(), headers, encode_chunked=True)\n\
        \x20   print('status', client.getresponse().status)\n\
        \x20   time.sleep(60)\n";
    let done = invoke(&carrel, source, r#"{"pieces": 8}"#, &["--timeout", "50s", "-m", "512m"]).succeeds();
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
    let line = ["invoke", "--zip", &zip, "--runtime", "provided", "--timeout", "30s"];
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
    let zip = python(&carrel.scratch(), "def other(event, context):\n    return 1\n");
    for (handler, kind) in
        [("app.handler", "Runtime.HandlerNotFound"), ("nowhere.handler", "Runtime.ImportModuleError")]
    {
        let done = carrel.run(&["invoke", "--zip", &zip, "--handler", handler, "--timeout", "60s"]);
        let done = done.ends_with(3);
        assert_eq!(answer(&done)["errorType"], json!(kind), "{done:?}");
    }
}

#[test]
fn a_response_that_is_too_large_is_refused() {
    let carrel = Carrel::new();
    let source = "def handler(event, context):\n    return 'x' * (7 << 20)\n";
    let done = invoke(&carrel, source, "{}", &["--timeout", "90s", "--memory", "512m"]).ends_with(4);
    assert_eq!(answer(&done)["errorType"], json!("Function.ResponseSizeTooLarge"));
}

#[test]
fn a_function_that_needs_too_much_memory_is_told_so() {
    let carrel = Carrel::new();
    let zip = rust_bootstrap();
    let event = r#"{"do": "fill memory"}"#;
    let line = ["invoke", "--zip", &zip, "--runtime", "provided", "--timeout", "60s", "--memory", "128m"];
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
    let source = "import os\n\
        def handler(event, context):\n\
        \x20   open('/tmp/ok', 'w').write('1')\n\
        \x20   try:\n\
        \x20       open('/var/task/no', 'w')\n\
        \x20   except OSError as error:\n\
        \x20       return [error.errno, os.path.islink('/var/task/link'), os.readlink('/var/task/link')]\n";
    let zip = FunctionZip::new().file("app.py", source).link("link", "app.py").write(&carrel.scratch());
    let line = ["invoke", "--zip", zip.to_str().unwrap(), "--handler", "app.handler", "--timeout", "60s"];
    let done = carrel.run(&line).succeeds();
    let got = answer(&done);
    assert!([json!(30), json!(13)].contains(&got[0]), "{got}");
    assert_eq!((&got[1], &got[2]), (&json!(true), &json!("app.py")));
}

#[test]
fn nobody_becomes_root_in_a_function() {
    let carrel = Carrel::new();
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
            "60s",
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
    let carrel = Carrel::new();
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
