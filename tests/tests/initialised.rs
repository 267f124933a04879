//! Rooms that begin where their workload was ready: what it had done stays done, and what must be each clone's own is.

// A test fails by panicking, and so do the functions that tests share.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use carrel_tests::{Carrel, Done, fixtures, functions};
use serde_json::{Value, json};

/// Small, so that saving one takes seconds under emulation.
const MEMORY: &str = "160m";
/// What programs that want to be cloned do (docs/agent.md).
const READY: &str = "
import json, socket
def ready():
    global agent
    agent = socket.socket(socket.AF_UNIX)
    agent.connect('/run/carrel/clone.sock')
    agent.sendall(b'ready\\n')
    return json.loads(agent.makefile().readline())
";

fn run(carrel: &Carrel, more: &[&str], script: &str) -> Done {
    let script = format!("{READY}{script}");
    let line = ["run", "--initialised", "-m", MEMORY, "--timeline"];
    carrel.run(&[&line[..], more, &[&fixtures::image("debian"), "python3", "-c", &script]].concat())
}

fn began_from_new_template(done: &Done) -> bool {
    assert!(done.errors().contains("start: clone"), "{done:?}");
    done.errors().contains("template made")
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64()
}

#[test]
fn a_program_goes_on_where_it_was_ready_as_somebody_else_each_time() {
    let carrel = Carrel::with_own_store();
    let script = "
import os, random, time, decimal, asyncio
print('imports done', flush=True)
before = time.monotonic()
drawn = random.random()
who = ready()
random.seed(bytes.fromhex(who['entropy']))
print(json.dumps({
    'id': who['id'], 'told': who['realtime_ns'] / 1e9, 'now': time.time(), 'went_on': time.monotonic() - before,
    'drawn': drawn, 'seeded': random.random(), 'urandom': os.urandom(16).hex(), 'hostname': socket.gethostname(),
    'file': open('/etc/hostname').read().strip(), 'left': os.path.exists('/left'), 'variable': os.environ['A'],
    'pid': os.getpid(), 'said': input(),
}), flush=True)
open('/left', 'w').close()
os._exit(7)
";
    let mut all = Vec::new();
    for n in 0..3 {
        let begun = now();
        let script = format!("{READY}{script}");
        let line = ["run", "--initialised", "-i", "-m", MEMORY, "--timeline", "-e", "A=1"];
        let image = fixtures::image("debian");
        let line = [&line[..], &[&image, "python3", "-c", &script]].concat();
        let done = carrel.run_with_input(&line, format!("line {n}\n").as_bytes()).ends_with(7);
        assert_eq!(began_from_new_template(&done), n == 0, "{done:?}");
        // What it said on its way there, it said once, and not as a room's output.
        assert_eq!(done.errors().contains("imports done"), n == 0, "{done:?}");
        assert!(done.errors().contains("workload attached"), "{done:?}");
        let said: Value = serde_json::from_str(done.text()).unwrap_or_else(|_| panic!("{done:?}"));
        for time in ["told", "now"] {
            let time = said[time].as_f64().unwrap();
            assert!((begun - 1.0..=now() + 1.0).contains(&time), "{begun}: {said}");
        }
        assert!(said["went_on"].as_f64().unwrap() >= 0.0, "{said}");
        assert_eq!((&said["left"], &said["variable"]), (&json!(false), &json!("1")));
        assert_eq!(said["said"], json!(format!("line {n}")), "its input is each clone's own");
        assert_eq!((&said["hostname"], &said["file"]), (&said["id"], &said["id"]));
        all.push(said);
        // A clone that believed its template's time would be late by this and more.
        std::thread::sleep(Duration::from_secs(2));
    }
    let different =
        |field: &str| all.iter().map(|said| said[field].to_string()).collect::<BTreeSet<_>>().len();
    for field in ["id", "seeded", "urandom", "hostname"] {
        assert_eq!(different(field), 3, "{field}: {all:?}");
    }
    for field in ["drawn", "pid"] {
        assert_eq!(different(field), 1, "{field}: it was done before: {all:?}");
    }
    let listed = carrel.json(&["template", "ls", "--json"]);
    assert_eq!((listed.as_array().unwrap().len(), &listed[0]["point"]), (1, &json!("initialised")));
    assert!(!listed.to_string().contains("A=1"), "{listed}");
}

#[test]
#[ignore = "long: under emulation a template of Python's takes half a minute"]
fn detached_rooms_log_what_they_say_as_clones() {
    let carrel = Carrel::with_own_store();
    let script = format!("{READY}\nready()\nprint('serves', flush=True)\nimport time\ntime.sleep(600)\n");
    for name in ["one", "two"] {
        let options = ["--initialised", "-m", MEMORY, "--name", name];
        carrel.detach(&[&options[..], &[&fixtures::image("debian"), "python3", "-c", &script]].concat());
        carrel.wait_for_log(name, "serves");
        let hostname = carrel.run(&["exec", name, "hostname"]).succeeds().text().trim().to_owned();
        let found = carrel.rooms(false).into_iter().find(|room| room["name"] == name).unwrap();
        assert_eq!(found["id"], json!(hostname));
    }
    carrel.run(&["rm", "--force", "one", "two"]).succeeds();
}

#[test]
#[ignore = "long: under emulation a template of Python's takes half a minute"]
fn what_a_workload_was_told_makes_the_template() {
    let carrel = Carrel::with_own_store();
    let script = "ready()\nimport os\nprint(os.environ.get('A'), os.getcwd(), os.getuid())";
    let variants: [(&[&str], &str); 3] = [
        (&["-e", "A=1"], "1 /home/reader 0\n"),
        (&["-e", "A=2", "-w", "/tmp"], "2 /tmp 0\n"),
        (&["-e", "A=1"], "1 /home/reader 0\n"),
    ];
    for (n, (options, said)) in variants.into_iter().enumerate() {
        let user = [options, &["-u", "0"]].concat();
        let done = run(&carrel, &user, script).succeeds();
        assert_eq!((done.text(), began_from_new_template(&done)), (said, n < 2), "{done:?}");
    }
}

#[test]
fn a_program_that_is_never_ready_is_an_error_that_says_so() {
    let carrel = Carrel::with_own_store();
    let image = fixtures::busybox();
    let start = ["run", "--initialised", "-m", MEMORY, &image];
    let done = carrel.run(&[&start[..], &["sh", "-c", "echo trouble >&2; exit 3"]].concat());
    let done = done.complains(125, &["before it was ready", "exit status 3", "docs/agent.md"]);
    assert!(done.errors().contains("trouble"), "what it said tells why: {done:?}");
    carrel.run(&[&start[..], &["no-such-program"]].concat()).complains(127, &["no-such-program"]);
    carrel
        .run(&["run", "--initialised", "--cold", "-m", MEMORY, &image, "true"])
        .complains(125, &["--cold", "--initialised"]);
    assert_eq!(carrel.json(&["template", "ls", "--json"]), json!([]));
}

fn invoke(carrel: &Carrel, source: &str, event: &str) -> Done {
    let zip = functions::python(&carrel.scratch(), source);
    let line = ["invoke", "--initialised", "--timeline", "--handler", "app.handler", "--zip", &zip];
    carrel.run(&[&line[..], &["--timeout", "600s", "--event", event]].concat())
}

#[test]
fn a_function_that_was_initialised_answers_without_its_init() {
    let carrel = Carrel::with_own_store();
    let source = "
import os, random, time
time.sleep(3)
print('loaded', flush=True)
drawn = random.random()
def handler(event, context):
    return {'event': event, 'drawn': drawn, 'random': random.random(), 'urandom': os.urandom(8).hex(),
            'now': time.time(), 'stream': os.environ.get('AWS_LAMBDA_LOG_STREAM_NAME')}
";
    let zip = functions::python(&carrel.scratch(), source);
    let line = ["template", "create-function", "--initialised", "--json", "--zip", &zip];
    let made =
        carrel.run(&[&line[..], &["--handler", "app.handler", "--timeout", "600s"]].concat()).succeeds();
    let record: Value = serde_json::from_str(made.text()).unwrap();
    assert_eq!((&record["made"], &record["point"]), (&json!(true), &json!("initialised")));
    assert!(made.errors().contains("loaded"), "what INIT says is heard once: {made:?}");
    let mut all: Vec<Value> = Vec::new();
    for n in 0..3 {
        let begun = now();
        let done = invoke(&carrel, source, &format!("{{\"n\": {n}}}")).succeeds();
        assert!(!began_from_new_template(&done) && !done.errors().contains("loaded"), "{done:?}");
        assert!(done.errors().contains("RESTORE_START Runtime Version: python3.11"), "{done:?}");
        assert!(!done.errors().contains("Init Duration"), "its INIT was the template's: {done:?}");
        let said: Value = serde_json::from_str(done.text()).unwrap();
        assert_eq!((&said["event"]["n"], &said["stream"]), (&json!(n), &Value::Null));
        assert!((begun - 1.0..=now() + 1.0).contains(&said["now"].as_f64().unwrap()), "{begun}: {said}");
        all.push(said);
    }
    for (field, values) in [("drawn", 1), ("random", 3), ("urandom", 3)] {
        let found: BTreeSet<String> = all.iter().map(|said| said[field].to_string()).collect();
        assert_eq!(found.len(), values, "{field}: {all:?}");
    }
}

#[test]
#[ignore = "long: under emulation a template of Python's takes half a minute"]
fn a_function_whose_init_fails_says_so_as_any_other() {
    let carrel = Carrel::with_own_store();
    let done =
        invoke(&carrel, "import no_such_module\ndef handler(event, context): pass\n", "{}").ends_with(3);
    let error: Value = serde_json::from_str(done.text()).unwrap_or_else(|_| panic!("{done:?}"));
    assert_eq!(error["errorType"], json!("Runtime.ImportModuleError"));
    let points: Vec<Value> = carrel
        .json(&["template", "ls", "--json"])
        .as_array()
        .unwrap()
        .iter()
        .map(|listed| listed["point"].clone())
        .collect();
    assert_eq!(points, [json!("unpacked")], "no template of a function that does not load");
}
