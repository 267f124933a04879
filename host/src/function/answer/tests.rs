use super::*;

const ID: &str = "8476a536-e9f4-11e8-9739-2dfe598c3fcd";

fn invoked(outcome: Outcome) -> Invoked {
    Invoked {
        id: ID.into(),
        outcome,
        init_us: Some(117_859),
        duration_us: 12_961,
        memory_peak_bytes: 48 << 20,
        response_bytes: 0,
    }
}

fn with<T>(invoked: &Invoked, look: impl FnOnce(&Answer<'_>) -> T) -> T {
    let memory = FunctionMemory::try_from(128).unwrap();
    let timeout = FunctionTimeout::try_from(std::time::Duration::from_secs(3)).unwrap();
    look(&Answer { id: ID, memory, timeout, invoked })
}

fn error(outcome: Outcome) -> Option<(String, String)> {
    with(&invoked(outcome), |answer| answer.error().map(|e| (e.error_type, e.error_message)))
}

fn end(invoked: &Invoked) -> String {
    with(invoked, |answer| answer.end(1_000_000_000_123_456_789))
}

#[test]
fn a_response_is_reported_in_lambdas_line() {
    let response = invoked(Outcome::Response { content_type: "application/json".into() });
    assert_eq!(
        end(&response),
        format!(
            "END RequestId: {ID}\nREPORT RequestId: {ID}\tDuration: 12.96 ms\tBilled Duration: 131 ms\t\
             Memory Size: 128 MB\tMax Memory Used: 48 MB\tInit Duration: 117.86 ms\t\n"
        )
    );
    let warm = Invoked { init_us: None, ..response.clone() };
    assert!(end(&warm).ends_with("Billed Duration: 13 ms\tMemory Size: 128 MB\tMax Memory Used: 48 MB\t\n"));
    assert_eq!(with(&response, |answer| (answer.class(), answer.sentence())), (Class::Answered, None));
    assert_eq!(error(response.outcome), None);
    assert_eq!(start(ID), format!("START RequestId: {ID} Version: $LATEST\n"));
}

#[test]
fn a_functions_own_error_stands_for_itself() {
    let failed = invoked(Outcome::Error { error_type: "Function.Odd".into() });
    assert_eq!(error(failed.outcome.clone()), None);
    assert!(!end(&failed).contains("Status:"));
    let sentence = with(&failed, |answer| answer.sentence().unwrap());
    assert!(sentence.contains("(Function.Odd)"), "{sentence}");
    let unhandled = invoked(Outcome::Error { error_type: "Unhandled\x1b".into() });
    let sentence = with(&unhandled, |answer| answer.sentence().unwrap());
    assert_eq!(sentence, "The function answered with an error; it is on standard output.");
    assert_eq!(with(&failed, |answer| answer.class()), Class::FunctionError);
}

#[test]
fn a_timeout_is_lambdas() {
    let late = invoked(Outcome::TimedOut);
    let message = format!("RequestId: {ID} Error: Task timed out after 3.00 seconds");
    assert_eq!(error(Outcome::TimedOut), Some(("Sandbox.Timedout".into(), message)));
    let lines = end(&late);
    assert!(
        lines.starts_with(&format!("2001-09-09T01:46:40.123Z {ID} Task timed out after 3.00 seconds\n\n"))
    );
    assert!(lines.ends_with("\tStatus: timeout\t\n"), "{lines}");
    let never = Invoked { duration_us: 0, init_us: Some(13_000_000), ..invoked(Outcome::InitTimedOut) };
    assert!(
        end(&never).starts_with("INIT_REPORT Init Duration: 13000.00 ms\tPhase: init\tStatus: timeout\n"),
        "{}",
        end(&never)
    );
    assert_eq!(with(&never, |answer| answer.class()), Class::TimedOut);
}

#[test]
fn a_runtimes_exit_has_its_status_or_signal() {
    let exited = |status, out_of_memory| error(Outcome::Exited { status, out_of_memory }).unwrap();
    for (status, kind, words) in [
        (ExitStatus::Code(0), "Runtime.ExitError", "Runtime exited without providing a reason"),
        (ExitStatus::Code(9), "Runtime.ExitError", "Runtime exited with error: exit status 9"),
        (ExitStatus::Signal(6), "Runtime.ExitError", "Runtime exited with error: signal: aborted"),
        (ExitStatus::Signal(9), "Runtime.ExitError", "Runtime exited with error: signal: killed"),
        (ExitStatus::Signal(40), "Runtime.ExitError", "Runtime exited with error: signal 40"),
    ] {
        assert_eq!(exited(status, false), (kind.to_owned(), format!("RequestId: {ID} Error: {words}")));
    }
    assert_eq!(exited(ExitStatus::Signal(9), true).0, "Runtime.OutOfMemory");
    assert_eq!(exited(ExitStatus::Code(1), true).0, "Runtime.ExitError", "a child of it was killed");
    let lines = end(&invoked(Outcome::Exited { status: ExitStatus::Code(9), out_of_memory: false }));
    assert!(lines.ends_with("\tStatus: error\tError Type: Runtime.ExitError\t\n"), "{lines}");
    assert!(!lines.contains("INIT_REPORT"));
    let early = Invoked {
        duration_us: 0,
        ..invoked(Outcome::Exited { status: ExitStatus::Code(9), out_of_memory: false })
    };
    let expected =
        "INIT_REPORT Init Duration: 117.86 ms\tPhase: init\tStatus: error\tError Type: Runtime.ExitError\n";
    assert!(end(&early).starts_with(expected), "{}", end(&early));
}

#[test]
fn too_large_a_response_has_both_sizes() {
    let (kind, message) = error(Outcome::ResponseTooLarge { bytes: 7_340_034 }).unwrap();
    assert_eq!(kind, "Function.ResponseSizeTooLarge");
    assert_eq!(
        message,
        "Response payload size (7340034 bytes) exceeded maximum allowed payload size (6291556 bytes)."
    );
}

#[test]
fn an_init_error_without_a_body_gets_one_and_with_one_keeps_it() {
    let bare = invoked(Outcome::InitError { error_type: "Runtime.ImportModuleError".into() });
    let (kind, message) = with(&bare, |answer| {
        let error = answer.error().unwrap();
        (error.error_type, error.error_message)
    });
    assert_eq!(
        (kind.as_str(), message),
        ("Runtime.ImportModuleError", format!("RequestId: {ID} Error: INIT failed"))
    );
    let told = Invoked { response_bytes: 5, ..bare };
    assert_eq!(with(&told, |answer| (answer.error(), answer.class())), (None, Class::RuntimeFailed));
    assert!(
        end(&told).contains("\tStatus: error\tError Type: Runtime.ImportModuleError\t"),
        "{}",
        end(&told)
    );
}

#[test]
fn types_that_a_guest_made_up_are_replaced_where_carrel_speaks() {
    for wrong in
        ["Unhandled", "Runtime.", "Runtime.bad", "Runtime.A\tB", "Other.Error", "Runtime.A\x1b[2J", ""]
    {
        assert_eq!(known(wrong, "Function.Unknown"), "Function.Unknown", "{wrong:?}");
    }
    assert_eq!(known("Function.Odd", "Function.Unknown"), "Function.Odd");
    assert_eq!(known(&format!("Runtime.{}", "X".repeat(256)), "Runtime.Unknown"), "Runtime.Unknown");
}

#[test]
fn a_program_that_is_missing_is_an_invalid_entrypoint_and_nothing_else_is() {
    let refused = |failure| {
        let message = "the command '/var/task/bootstrap' is not found".to_owned();
        unstartable(ID, &outcome::Outcome::Refused { failure, message })
    };
    for failure in [Failure::CommandNotFound, Failure::CommandNotExecutable] {
        let error = refused(failure).unwrap();
        assert_eq!(error.error_type, "Runtime.InvalidEntrypoint");
        assert!(error.error_message.starts_with(&format!("RequestId: {ID} Error: the command")));
        let lines = not_started(ID, FunctionMemory::try_from(128).unwrap(), &error);
        assert!(lines.starts_with(&start(ID)), "{lines}");
        assert!(lines.ends_with("\tStatus: error\tError Type: Runtime.InvalidEntrypoint\t\n"), "{lines}");
    }
    assert_eq!(refused(Failure::BadPayload), None);
    assert_eq!(unstartable(ID, &outcome::Outcome::GuestPanicked { last_words: None }), None);
}
