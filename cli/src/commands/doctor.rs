//! `carrel doctor`: what the host's examination found, for people and for programs.

use anyhow::Result;
use carrel_host::doctor::{self, Report, Status};

use super::place;
use crate::arguments::DoctorArgs;
use crate::configuration::Configuration;
use crate::failure::{self, WithStatus};

/// `carrel doctor`. Opens no home: it must say something even where none can be opened.
pub(crate) fn doctor(args: &DoctorArgs, configuration: &Configuration) -> Result<u8> {
    let assets = place::assets(configuration)?;
    let report = doctor::examine(&configuration.home, &configuration.store, &assets, configuration.patience);
    if args.json {
        failure::print(format_args!("{}\n", serde_json::to_string_pretty(&report)?))?;
    } else {
        failure::print(render(&report))?;
    }
    if report.is_fit() {
        return Ok(0);
    }
    let missing = report.missing().collect::<Vec<_>>().join(", ");
    Err(WithStatus::new(failure::FAILED, format!("Rooms can't run on this host; mend first: {missing}."))
        .into())
}

/// A line a check, and below it what mends it.
fn render(report: &Report) -> String {
    let width = report.checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for check in &report.checks {
        let word = match check.status {
            Status::Ok => "ok",
            Status::Warning => "warning",
            Status::Missing => "missing",
        };
        text.push_str(&format!("{word:<7}  {:<width$}  {}\n", check.name, check.detail));
        if let Some(mend) = &check.mend {
            text.push_str(&format!("{:<7}  {:<width$}  mend: {mend}\n", "", ""));
        }
    }
    text.push_str(match (report.is_fit(), report.checks.iter().all(|check| check.status == Status::Ok)) {
        (true, true) => "Rooms can run on this host.\n",
        (true, false) => "Rooms can run on this host, with the warnings above.\n",
        (false, _) => "",
    });
    text
}

#[cfg(test)]
mod tests {
    use carrel_host::doctor::Check;

    use super::*;

    #[test]
    fn what_is_not_well_has_its_mend_below_it() {
        let check = |name: &str, status, mend: Option<&str>| Check {
            name: name.into(),
            status,
            detail: "found".into(),
            mend: mend.map(Into::into),
        };
        let mut report = Report {
            checks: vec![check("smt", Status::Ok, None), check("ksm-x", Status::Warning, Some("echo 2"))],
        };
        assert_eq!(
            render(&report),
            "ok       smt    found\n\
             warning  ksm-x  found\n\u{20}               mend: echo 2\n\
             Rooms can run on this host, with the warnings above.\n"
        );
        report.checks.push(check("cgroup", Status::Missing, Some("mount it")));
        assert!(render(&report).ends_with("missing  cgroup  found\n                 mend: mount it\n"));
    }
}
