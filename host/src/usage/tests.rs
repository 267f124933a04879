use carrel_protocol::usage::{Cpu, Io, Memory, Network, Processes};
use serde_json::{Value, json};

use super::*;

fn validator() -> jsonschema::Validator {
    let schema: Value = serde_json::from_str(include_str!("../../../docs/usage.schema.json")).unwrap();
    assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
    jsonschema::validator_for(&schema).unwrap()
}

fn wrong(report: &Value) -> Vec<String> {
    validator().iter_errors(report).map(|error| format!("{}: {error}", error.instance_path())).collect()
}

/// Every field has a value of its own, none of them the default.
fn full() -> UsageReport {
    UsageReport {
        room: "0123456789ab".into(),
        name: Some("desk-1".into()),
        wall_us: 1,
        guest: Some(GuestUsage {
            wall_us: u64::MAX,
            cpu: Cpu { user_us: 2, system_us: 3, throttled_us: 4 },
            memory: Memory { current_bytes: 5, peak_bytes: 6, byte_seconds: u64::MAX, oom_kills: 7 },
            io: Io { read_bytes: 8, write_bytes: 9, read_operations: 10, write_operations: 11 },
            network: Network { received_bytes: 12, sent_bytes: 13 },
            processes: Processes { current: 14, peak: 15 },
        }),
        host: HostUsage {
            source: MeterSource::Cgroup,
            cpu_user_us: 16,
            cpu_system_us: 17,
            cpu_throttled_us: Some(18),
            pss_bytes: Some(19),
            pss_peak_bytes: Some(20),
            memory_current_bytes: Some(21),
            memory_peak_bytes: Some(22),
            kernel_memory_bytes: Some(23),
            read_bytes: Some(24),
            write_bytes: Some(25),
            read_operations: Some(26),
            write_operations: Some(27),
            given_back_bytes: Some(28),
        },
    }
}

fn minimal() -> UsageReport {
    UsageReport { name: None, guest: None, host: HostUsage::default(), ..full() }
}

/// JSON pointers of all objects and of all leaves in a value.
fn places(value: &Value, at: &str, objects: &mut Vec<String>, leaves: &mut Vec<String>) {
    let Value::Object(fields) = value else { return leaves.push(at.to_owned()) };
    objects.push(at.to_owned());
    for (name, value) in fields {
        places(value, &format!("{at}/{name}"), objects, leaves);
    }
}

#[test]
fn a_report_of_every_field_and_one_of_none_are_valid() {
    for report in [full(), minimal()] {
        let written = serde_json::to_value(&report).unwrap();
        assert_eq!(wrong(&written), Vec::<String>::new(), "{written:#}");
        assert_eq!(serde_json::from_value::<UsageReport>(written).unwrap(), report);
    }
}

#[test]
fn an_unknown_field_is_refused_wherever_it_is() {
    let report = serde_json::to_value(full()).unwrap();
    let (mut objects, mut leaves) = (Vec::new(), Vec::new());
    places(&report, "", &mut objects, &mut leaves);
    assert_eq!(objects.len(), 8, "{objects:?}");
    for at in objects {
        let mut changed = report.clone();
        changed.pointer_mut(&at).unwrap()["surprise"] = json!(1);
        assert!(!wrong(&changed).is_empty(), "{at}");
    }
}

#[test]
fn a_mistyped_or_missing_field_is_refused_whichever_it_is() {
    let report = serde_json::to_value(full()).unwrap();
    let (mut objects, mut leaves) = (Vec::new(), Vec::new());
    places(&report, "", &mut objects, &mut leaves);
    assert_eq!(leaves.len(), 33, "{leaves:?}");
    for at in leaves {
        for mistyped in [json!(-1), json!(1.5), json!("x y"), json!([]), json!(true)] {
            let mut changed = report.clone();
            *changed.pointer_mut(&at).unwrap() = mistyped.clone();
            assert!(!wrong(&changed).is_empty(), "{at} = {mistyped}");
        }
        let (object, name) = at.rsplit_once('/').unwrap();
        let mut changed = report.clone();
        changed.pointer_mut(object).unwrap().as_object_mut().unwrap().remove(name);
        assert!(!wrong(&changed).is_empty(), "without {at}");
    }
}

#[test]
fn every_number_says_its_unit() {
    let schema: Value = serde_json::from_str(include_str!("../../../docs/usage.schema.json")).unwrap();
    let (mut objects, mut leaves) = (Vec::new(), Vec::new());
    places(&serde_json::to_value(full()).unwrap(), "", &mut objects, &mut leaves);
    for at in leaves {
        let (unit, name) = match at.rsplit('_').next().unwrap() {
            "us" => ("microseconds", &at),
            "bytes" => ("bytes", &at),
            "seconds" => ("byte-seconds", &at),
            _ => continue,
        };
        let path = name.split('/').skip(1).collect::<Vec<_>>();
        let mut place = match path.first() {
            Some(&"guest") => &schema["$defs"]["guest"],
            _ => &schema,
        };
        for step in path.iter().skip(usize::from(path.first() == Some(&"guest"))) {
            place = &place["properties"][*step];
        }
        let description = place["description"].as_str().unwrap_or_else(|| panic!("{at} has no description"));
        assert!(description.contains(unit), "{at}: {description}");
    }
}
