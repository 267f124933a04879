use proptest::prelude::*;

use super::*;

fn function(engine: Engine) -> Function {
    Function {
        name: "answers".into(),
        engine,
        handler: Some("app.handler".into()),
        memory: FunctionMemory(1769),
        timeout: FunctionTimeout(3000),
        environment: vec!["A=1".into()],
    }
}

fn managed(runtime: &str) -> Function {
    function(Engine::Managed(runtime.into()))
}

fn parts() -> Parts {
    Parts {
        defaults: ImageDefaults {
            entrypoint: vec!["/var/runtime/start".into()],
            cmd: vec!["default.handler".into()],
            environment: vec!["PATH=/image".into()],
            working_directory: "/var/task".into(),
            user: "root".into(),
        },
        layers: Vec::new(),
        zip: Some(("sha256:00".into(), 7)),
        image: "answers".into(),
    }
}

fn around() -> Circumstances {
    Circumstances { init: Duration::from_secs(10), log_stream: Some(log_stream(0, [0xab; 16])) }
}

fn room(function: &Function) -> RoomSpec {
    function.room(parts(), &around()).unwrap()
}

fn variable<'a>(spec: &'a RoomSpec, name: &str) -> Option<&'a str> {
    spec.process.environment.iter().find_map(|one| one.strip_prefix(name)?.strip_prefix('='))
}

#[test]
fn a_zip_under_a_managed_runtime_finds_what_it_finds_on_lambda() {
    let spec = room(&managed("python3.11"));
    for (name, value) in [
        ("_HANDLER", "app.handler"),
        ("AWS_EXECUTION_ENV", "AWS_Lambda_python3.11"),
        ("AWS_LAMBDA_FUNCTION_NAME", "answers"),
        ("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "1769"),
        ("AWS_LAMBDA_FUNCTION_VERSION", "$LATEST"),
        ("AWS_LAMBDA_INITIALIZATION_TYPE", "on-demand"),
        ("AWS_LAMBDA_LOG_GROUP_NAME", "/aws/lambda/answers"),
        ("AWS_LAMBDA_LOG_STREAM_NAME", "1970/01/01/[$LATEST]abababababababababababababababab"),
        ("AWS_REGION", "us-east-1"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("LAMBDA_TASK_ROOT", "/var/task"),
        ("LAMBDA_RUNTIME_DIR", "/var/runtime"),
        ("LANG", "en_US.UTF-8"),
        ("TZ", ":UTC"),
        ("PATH", "/image"),
        ("A", "1"),
    ] {
        assert_eq!(variable(&spec, name), Some(value), "{name}");
    }
    assert_eq!(spec.process.arguments, ["/var/runtime/start", "default.handler"]);
    assert_eq!((spec.process.user.as_str(), spec.process.interactive), ("993:990", false));
    assert!(spec.surroundings.read_only_root);
    assert_eq!(spec.surroundings.volumes, ["/tmp"]);
    let zip = &spec.payload.zips[0];
    assert_eq!((zip.at.as_str(), zip.size), ("/var/task", 7));
    assert_eq!(spec.payload.unpacked_bytes, Some(ZIP_BYTES + RUNTIME_BYTES));
    let function = spec.function.unwrap();
    assert_eq!((function.timeout_ms, function.init_timeout_ms), (3000, 13_000));
    assert_eq!(function.response_bytes, 6_291_556);
}

#[test]
fn instances_that_begin_initialised_are_told_the_same() {
    let around = Circumstances::initialised(Patience::default());
    let function = managed("python3.11");
    let (one, other) = (function.room(parts(), &around).unwrap(), function.room(parts(), &around).unwrap());
    assert_eq!(one, other);
    assert!(one.initialised && !room(&function).initialised);
    assert_eq!(variable(&one, "AWS_LAMBDA_LOG_STREAM_NAME"), None);
    assert_eq!(variable(&one, "AWS_LAMBDA_FUNCTION_NAME"), Some("answers"));
}

#[test]
fn a_custom_runtime_is_its_bootstrap_and_an_image_its_command() {
    let spec = room(&Function { handler: None, ..managed("provided") });
    assert_eq!(spec.process.arguments, ["/var/task/bootstrap"]);
    assert_eq!((variable(&spec, "_HANDLER"), variable(&spec, "AWS_EXECUTION_ENV")), (None, None));
    let no_zip = Parts { zip: None, ..parts() };
    let spec = function(Engine::Image).room(no_zip.clone(), &around()).unwrap();
    assert_eq!(spec.process.arguments, ["/var/runtime/start", "app.handler"]);
    assert_eq!((spec.payload.zips.len(), spec.payload.unpacked_bytes), (0, None));
    let spec = Function { handler: None, ..function(Engine::Image) }.room(no_zip, &around()).unwrap();
    assert_eq!(spec.process.arguments, ["/var/runtime/start", "default.handler"]);
}

#[test]
fn memory_buys_cpus() {
    for (mb, millis, vcpus) in [(128, 73, 1), (1769, 1000, 1), (1770, 1001, 2), (10_240, 5789, 6)] {
        let spec = room(&Function { memory: FunctionMemory(mb), ..managed("python3.11") });
        assert_eq!(spec.surroundings.cpu_millis, Some(millis), "{mb} MB");
        assert_eq!(spec.machine.vcpus.get(), vcpus, "{mb} MB");
        assert_eq!(spec.surroundings.memory_bytes, Some(u64::from(mb) << 20));
        assert_eq!(u64::from(spec.machine.memory_mib), u64::from(mb) + GUEST_MIB);
    }
}

#[test]
fn the_users_variables_may_replace_defaults_but_not_the_truth() {
    let with = |environment: &[&str]| Function {
        environment: environment.iter().map(|&one| one.to_owned()).collect(),
        ..managed("python3.11")
    };
    let spec = room(&with(&["AWS_REGION=eu-north-1", "TZ=Europe/Vienna", "AWS_ACCESS_KEY_ID=x"]));
    for (name, value) in [
        ("AWS_REGION", "eu-north-1"),
        ("AWS_DEFAULT_REGION", "eu-north-1"),
        ("TZ", "Europe/Vienna"),
        ("AWS_ACCESS_KEY_ID", "x"),
    ] {
        assert_eq!(variable(&spec, name), Some(value));
    }
    for wrong in ["_HANDLER=x", "AWS_LAMBDA_FUNCTION_NAME=x", "LAMBDA_TASK_ROOT=", "AWS_LAMBDA_RUNTIME_API=x"]
    {
        let refused = with(&[wrong]).room(parts(), &around()).unwrap_err();
        assert_eq!(refused, FunctionError::Reserved(wrong.split('=').next().unwrap().into()));
    }
    let long = format!("A={}", "x".repeat(4095));
    assert_eq!(with(&[&long]).room(parts(), &around()).unwrap_err(), FunctionError::Environment(4097));
}

#[test]
fn what_can_not_be_a_function_is_refused() {
    let refused = |function: Function| function.room(parts(), &around()).unwrap_err();
    for name in ["", "a b", "ä", "a/b", &"x".repeat(65)] {
        let function = Function { name: name.into(), ..managed("python3.11") };
        assert_eq!(refused(function), FunctionError::Name(name.into()));
    }
    for handler in ["", "a b", "a\nb", &"x".repeat(129)] {
        let function = Function { handler: Some(handler.into()), ..managed("python3.11") };
        assert_eq!(refused(function), FunctionError::Handler, "{handler:?}");
    }
    let function = Function { handler: None, ..managed("python3.11") };
    assert_eq!(refused(function), FunctionError::NoHandler("python3.11".into()));
    let large = Parts { zip: Some(("sha256:00".into(), ZIP_BYTES + 1)), ..parts() };
    let refused = managed("python3.11").room(large, &around()).unwrap_err();
    assert_eq!(refused, FunctionError::Zip(ZIP_BYTES + 1));
}

#[test]
fn ranges_are_lambdas() {
    for (mb, good) in [(127, false), (128, true), (10_240, true), (10_241, false), (u64::MAX, false)] {
        assert_eq!(FunctionMemory::try_from(mb).is_ok(), good, "{mb}");
    }
    for (ms, good) in [(999, false), (1000, true), (900_000, true), (900_001, false), (u64::MAX, false)] {
        assert_eq!(FunctionTimeout::try_from(Duration::from_millis(ms)).is_ok(), good, "{ms}");
    }
    assert_eq!(FunctionTimeout(3000).to_string(), "3.00 seconds");
    assert_eq!(FunctionTimeout(1250).to_string(), "1.25 seconds");
}

proptest! {
    #[test]
    fn an_id_is_a_random_uuid(random: [u8; 16]) {
        let id = uuid(random);
        let lengths: Vec<usize> = id.split('-').map(str::len).collect();
        prop_assert_eq!(lengths, [8, 4, 4, 4, 12]);
        prop_assert!(id.bytes().all(|b| b == b'-' || matches!(b, b'0'..=b'9' | b'a'..=b'f')));
        prop_assert_eq!(id.as_bytes()[14], b'4', "the version");
        prop_assert!(matches!(id.as_bytes()[19], b'8' | b'9' | b'a' | b'b'), "the variant");
    }
}

#[test]
fn two_ids_differ() {
    assert_ne!(request_id().unwrap(), request_id().unwrap());
}

#[test]
fn a_trace_has_the_form_that_its_readers_parse() {
    let trace = trace(0x5bef_4de7 * 1_000_000_000 + 1, [0xad; 12], [0x9a, 0, 0, 0, 0, 0, 0, 1]);
    assert_eq!(trace, "Root=1-5bef4de7-adadadadadadadadadadadad;Parent=9a00000000000001;Sampled=0");
    assert_ne!(trace_id(0).unwrap(), trace_id(0).unwrap());
}
