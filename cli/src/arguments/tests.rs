use clap::{CommandFactory, error::ErrorKind};

use super::rooms::ExecArgs;
use super::run::{RunArgs, UsageFormat};
use super::*;

fn parse(line: &[&str]) -> Result<Command, clap::Error> {
    let cli = Cli::try_parse_from(std::iter::once(&"carrel").chain(line))?;
    Ok(cli.command.expect("a command was given"))
}

fn run(line: &[&str]) -> RunArgs {
    let line: Vec<&str> = std::iter::once("run").chain(line.iter().copied()).collect();
    match parse(&line) {
        Ok(Command::Run(args)) => *args,
        other => panic!("{line:?}: {other:?}"),
    }
}

fn exec(line: &[&str]) -> ExecArgs {
    let line: Vec<&str> = std::iter::once("exec").chain(line.iter().copied()).collect();
    match parse(&line) {
        Ok(Command::Exec(args)) => args,
        other => panic!("{line:?}: {other:?}"),
    }
}

fn refused(line: &[&str]) -> clap::Error {
    parse(line).expect_err("this should be refused")
}

#[test]
fn the_definition_is_sound() {
    Cli::command().debug_assert();
}

#[test]
fn options_after_the_image_belong_to_the_command() {
    let args = run(&["-e", "A=1", "img", "sh", "-e", "-c", "exit 7", "--", "--json", "--home", "x"]);
    assert_eq!(args.process.env, ["A=1"]);
    assert_eq!(args.image(), "img");
    assert_eq!(args.command(), ["sh", "-e", "-c", "exit 7", "--", "--json", "--home", "x"]);
}

#[test]
fn options_may_follow_the_image_directly_and_still_belong_to_the_command() {
    let args = run(&["img", "-d", "--name", "x"]);
    assert!(!args.detach);
    assert_eq!(args.command(), ["-d", "--name", "x"]);
}

#[test]
fn what_is_done_without_is_named_after_an_equals_sign_only() {
    use carrel_host::spec::Part;
    let without = |line: &[&str]| run(line).machine.unconfined.map(|without| without.0);
    assert_eq!(without(&["img"]), None);
    assert_eq!(without(&["--unconfined", "img"]), Some(Part::ALL.to_vec()));
    assert_eq!(without(&["--unconfined=cgroup,seccomp", "img"]), Some(vec![Part::Cgroup, Part::Seccomp]));
    assert!(refused(&["run", "--unconfined=kvm", "img"]).to_string().contains("cgroup, namespaces"));
}

#[test]
fn an_image_without_a_command_runs_its_own() {
    assert!(run(&["img"]).command().is_empty());
}

#[test]
fn short_options_combine_as_in_docker() {
    let args = run(&["-it", "-m512m", "-w", "/srv", "-u", "1000:1000", "img"]);
    assert!(args.interactive && args.tty);
    assert_eq!(args.machine.memory.map(|memory| memory.get()), Some(512));
    assert_eq!(args.process.workdir.as_deref(), Some("/srv"));
    assert_eq!(args.process.user.as_deref(), Some("1000:1000"));
}

#[test]
fn usage_takes_a_format_only_after_an_equals_sign() {
    assert_eq!(run(&["img"]).usage.usage, None);
    assert_eq!(run(&["--usage", "img"]).usage.usage, Some(UsageFormat::Table));
    assert_eq!(run(&["--usage=json", "img"]).usage.usage, Some(UsageFormat::Json));
    let json_is_the_image = run(&["--usage", "json"]);
    assert_eq!(json_is_the_image.image(), "json");
}

#[test]
fn an_empty_entry_point_is_not_a_missing_one() {
    assert_eq!(run(&["--entrypoint", "", "img"]).process.entrypoint.as_deref(), Some(""));
    assert_eq!(run(&["img"]).process.entrypoint, None);
}

#[test]
fn values_out_of_range_name_their_option() {
    for (line, option) in [
        (["run", "-m", "1m", "img"], "--memory"),
        (["run", "--cpus", "17", "img"], "--cpus"),
        (["run", "--timeout", "0", "img"], "--timeout"),
        (["run", "--tmpfs", "tmp", "img"], "--tmpfs"),
        (["run", "--pull", "maybe", "img"], "--pull"),
        (["kill", "-s", "NOPE", "room"], "--signal"),
    ] {
        let error = refused(&line);
        assert!(error.to_string().contains(option), "{error}");
    }
}

#[test]
fn detached_rooms_may_have_input_and_a_terminal_and_report_no_usage_at_the_end() {
    let args = run(&["-dit", "img", "sh"]);
    assert!(args.detach && args.interactive && args.tty);
    assert_eq!(refused(&["run", "-d", "--usage", "img"]).kind(), ErrorKind::ArgumentConflict);
    assert_eq!(refused(&["run", "-d", "--usage-file", "f", "img"]).kind(), ErrorKind::ArgumentConflict);
}

#[test]
fn every_command_that_may_pull_can_do_so_over_plain_http() {
    assert!(run(&["--insecure", "registry.example/img"]).source.insecure);
    match parse(&["invoke", "--insecure", "--image", "registry.example/fn"]) {
        Ok(Command::Invoke(args)) => assert!(args.function.insecure),
        other => panic!("{other:?}"),
    }
}

#[test]
fn run_needs_an_image_and_exec_a_command() {
    assert_eq!(refused(&["run", "-i"]).kind(), ErrorKind::MissingRequiredArgument);
    assert!(parse(&["exec", "room"]).is_err());
}

#[test]
fn exec_takes_its_own_options_before_the_room_only() {
    let args = exec(&["-it", "-e", "A=1", "room", "ls", "-i", "-l"]);
    assert!(args.interactive && args.tty);
    assert_eq!((args.room(), args.command()), ("room", ["ls", "-i", "-l"].map(String::from).as_slice()));
}

#[test]
fn a_function_is_a_zip_or_an_image() {
    assert!(parse(&["invoke", "--zip", "f.zip", "--handler", "a.b"]).is_ok());
    assert!(parse(&["invoke", "--image", "img"]).is_ok());
    assert_eq!(refused(&["invoke"]).kind(), ErrorKind::MissingRequiredArgument);
    assert_eq!(refused(&["invoke", "--zip", "f", "--image", "i"]).kind(), ErrorKind::ArgumentConflict);
}

#[test]
fn an_event_may_be_a_dash_or_a_negative_number() {
    for event in ["-", "-1", "@file", "{}"] {
        match parse(&["invoke", "--zip", "f.zip", "--event", event]) {
            Ok(Command::Invoke(args)) => assert_eq!(args.event, [event]),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn global_options_go_before_and_after_the_command() {
    for line in [["carrel", "--home", "/x", "ps"], ["carrel", "ps", "--home", "/x"]] {
        let cli = Cli::try_parse_from(line).unwrap();
        assert_eq!(cli.global.home.unwrap(), PathBuf::from("/x"));
    }
}

#[test]
fn the_command_of_a_wrong_line_is_found_behind_whatever_precedes_it() {
    use std::os::unix::ffi::OsStringExt;
    let word = |line: &[&str]| command_word(line.iter().map(Into::into));
    for line in [
        &["run", "--bad"][..],
        &["--home", "/x", "run", "--bad"],
        &["--home=/x", "run", "--bad"],
        &["--log-level", "exec", "--print-config", "run", "ps"],
        &["--nonsense", "run"],
    ] {
        assert_eq!(word(line).unwrap(), "run", "{line:?}");
    }
    assert_eq!(word(&["--home"]), None);
    assert_eq!(word(&["--home", "run"]), None, "that is the home");
    let garbled = OsString::from_vec(vec![0xff, 0xfe]);
    assert_eq!(command_word(std::iter::once(garbled.clone())), Some(garbled));
}

#[test]
fn every_command_that_people_use_shows_examples() {
    for command in Cli::command().get_subcommands() {
        let name = command.get_name();
        if command.is_hide_set() || name == "version" {
            continue;
        }
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        assert!(help.contains("Examples:\n  carrel "), "{name} has no examples");
        assert!(help.contains(&format!("carrel {name}")), "{name}'s examples don't use it");
    }
}

#[test]
fn the_commands_on_templates_show_examples_of_themselves() {
    let cli = Cli::command();
    let template = cli.find_subcommand("template").unwrap();
    for command in template.get_subcommands() {
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        let own = format!("Examples:\n  carrel template {}", command.get_name());
        assert!(help.starts_with(&own), "{help}");
    }
}

#[test]
fn templates_are_pruned_by_sizes_and_times_as_people_write_them() {
    let pruned = |line: &[&str]| {
        let line: Vec<&str> = ["template", "prune"].iter().chain(line).copied().collect();
        match parse(&line) {
            Ok(Command::Template(template::TemplateArgs {
                command: template::TemplateCommand::Prune(args),
            })) => args,
            other => panic!("{line:?}: {other:?}"),
        }
    };
    let args = pruned(&["--max-size", "1.5g", "--older-than", "7d"]);
    assert_eq!((args.max_size, args.older_than.unwrap().as_secs()), (Some(3 << 29), 7 * 86_400));
    assert!(!args.all && !args.dry_run);
    assert!(refused(&["template", "prune", "--max-size", "much"]).to_string().contains("--max-size"));
    assert_eq!(refused(&["template", "rm"]).kind(), ErrorKind::MissingRequiredArgument);
    assert_eq!(refused(&["template", "ls", "-q", "--json"]).kind(), ErrorKind::ArgumentConflict);
}

#[test]
fn help_has_every_option_below_its_own_heading() {
    let mut cli = Cli::command();
    assert!(cli.render_help().to_string().starts_with("Runs OCI images and Lambda functions"));
    let run = cli.find_subcommand_mut("run").unwrap();
    let heading = |id: &str| {
        let argument = run.get_arguments().find(|known| known.get_id() == id).unwrap();
        argument.get_help_heading().map(str::to_owned)
    };
    for id in ["detach", "pull", "platform", "insecure", "rm", "image_and_command"] {
        assert_eq!(heading(id), None, "{id}");
    }
    assert_eq!(heading("usage_file").as_deref(), Some("Usage"));
    assert_eq!(heading("workdir").as_deref(), Some("Process"));
}

#[test]
fn the_options_of_bench_are_its_programs_own() {
    for words in [&["--help"][..], &["--quick", "--out", "dir"], &["--only=burst", "-x"], &[]] {
        let line = [&["carrel", "bench"], words].concat();
        match Cli::try_parse_from(line).map(|cli| cli.command) {
            Ok(Some(Command::Bench(args))) => assert_eq!(args.options, words),
            other => panic!("{words:?}: {other:?}"),
        }
    }
}

#[test]
fn a_function_is_said_alike_to_whoever_begins_it() {
    let function = ["--zip", "f.zip", "--handler", "app.handler", "-m", "256m", "-e", "A=1"];
    let invoked = match parse(&[&["invoke"], &function[..], &["--event", "{}"]].concat()) {
        Ok(Command::Invoke(args)) => args.function,
        other => panic!("{other:?}"),
    };
    let created = match parse(&[&["template", "create-function", "--pin"], &function[..]].concat()) {
        Ok(Command::Template(super::template::TemplateArgs {
            command: super::template::TemplateCommand::CreateFunction(args),
        })) => args.function,
        other => panic!("{other:?}"),
    };
    assert_eq!(format!("{invoked:?}"), format!("{created:?}"));
    for line in [&["invoke"][..], &["template", "create-function"]] {
        let error = refused(&[line, &["--handler", "app.handler"]].concat());
        assert_eq!(error.kind(), ErrorKind::MissingRequiredArgument, "neither a zip nor an image");
    }
}
