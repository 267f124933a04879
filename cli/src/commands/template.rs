//! Commands on templates.

use std::os::fd::OwnedFd;
use std::time::SystemTime;

use anyhow::{Result, ensure};
use carrel_host::pool::PoolError;
use carrel_host::timestamp::rfc3339_of;
use carrel_host::{Home, RoomSpec};
use carrel_protocol::{chain, one_line};
use carrel_store::printable::Printable;
use carrel_store::templates::{
    Damage, Listed, Part, PrunedTemplates, TemplateError, TemplatePolicy, TemplateRecord,
};
use carrel_store::{Store, TemplateKey, Templates};
use serde_json::{Map, Value, json};

use super::payload::Acquired;
use super::run::Asked;
use super::{begin, invoke, place};
use crate::arguments::template::{
    CreateArgs, CreateFunctionArgs, InspectArgs, LsArgs, MadeArgs, PruneArgs, TemplateArgs, TemplateCommand,
    VerifyArgs,
};
use crate::configuration::Configuration;
use crate::failure::{self, WithStatus};
use crate::table::{Align, Table};
use crate::terminal;
use crate::values::{size, span};

/// Digits of a key that a table shows.
const SHORT: usize = 12;

/// `carrel template`.
pub(crate) fn template(args: &TemplateArgs, configuration: &Configuration) -> Result<u8> {
    let store = place::store(configuration)?;
    let templates = store.templates();
    match &args.command {
        TemplateCommand::Create(args) => create(args, &store, configuration),
        TemplateCommand::CreateFunction(args) => create_function(args, &store, configuration),
        TemplateCommand::Ls(args) => ls(args, templates),
        TemplateCommand::Inspect(args) => inspect(args, templates),
        TemplateCommand::Pin(args) => each(templates, &args.templates, "pinned", Templates::pin),
        TemplateCommand::Unpin(args) => each(templates, &args.templates, "unpinned", Templates::unpin),
        TemplateCommand::Rm(args) => each(templates, &args.templates, "removed", Templates::remove),
        TemplateCommand::Verify(args) => verify(args, templates),
        TemplateCommand::Prune(args) => prune(args, templates),
    }
}

/// Makes the template that rooms of this kind begin with, unless it is there.
fn create(args: &CreateArgs, store: &Store, configuration: &Configuration) -> Result<u8> {
    let nothing = ["true".to_owned()];
    let command = match args.initialised {
        true => args.command(),
        // A template of files is every command's, and an image need not have one.
        false => {
            ensure!(
                args.command().is_empty(),
                "The template of an image's files is every command's: leave the command out, or ask for --initialised."
            );
            &nothing[..]
        }
    };
    let asked = Asked {
        image: args.image(),
        command,
        source: &args.source,
        process: &args.process,
        machine: &args.machine,
        interactive: args.interactive,
        terminal: args.tty.then_some(terminal::FALLBACK),
    };
    let home = place::home(configuration)?;
    let composed = asked.compose(None, &home, store, configuration)?;
    let spec = RoomSpec { initialised: args.initialised, ..composed.spec };
    make(&spec, (&composed.blobs, &composed.acquired), &args.made, (&home, store))
}

/// Makes the template that a function's rooms begin with, unless it is there.
fn create_function(args: &CreateFunctionArgs, store: &Store, configuration: &Configuration) -> Result<u8> {
    let function = invoke::function(&args.function)?;
    let home = place::home(configuration)?;
    home.assets().check()?;
    let composed = invoke::Composed::of(function, &args.function, store, configuration)?;
    let room = composed.room(args.initialised, configuration)?;
    let spec = RoomSpec { initialised: args.initialised, ..room };
    make(&spec, (&composed.blobs, &composed.acquired), &args.made, (&home, store))
}

/// Makes a room's template, and says whether it was there.
fn make(
    spec: &RoomSpec,
    (blobs, acquired): (&[OwnedFd], &Acquired),
    args: &MadeArgs,
    (home, store): (&Home, &Store),
) -> Result<u8> {
    let pool = begin::pool(home, store, args.domain.as_deref())?;
    let created = match pool.create_template(spec, blobs) {
        Err(PoolError::Refused(ended)) => {
            acquired.settle(store, &ended.outcome);
            return Err(WithStatus::new(failure::FAILED, ended.outcome.sentence().unwrap_or_default()).into());
        }
        created => created?,
    };
    let (key, templates) = (created.template.key(), store.templates());
    if args.pin {
        templates.pin(key)?;
    }
    if !args.json {
        let done = if created.made { "created" } else { "there already:" };
        failure::print(format_args!("{done} {key}\n"))?;
        return Ok(0);
    }
    let listed =
        templates.inspect(key)?.ok_or_else(|| TemplateError::Unknown(Printable::new(key.as_str())))?;
    let mut object = as_json(&listed);
    if let Some(object) = object.as_object_mut() {
        object.insert("made".into(), created.made.into());
    }
    failure::print(format_args!("{}\n", serde_json::to_string_pretty(&object)?))?;
    Ok(0)
}

fn ls(args: &LsArgs, templates: &Templates) -> Result<u8> {
    let listed = templates.list()?;
    if args.json {
        return print_json(&listed.iter().map(as_json).collect());
    }
    if args.quiet {
        failure::print(listed.iter().map(|listed| format!("{}\n", listed.key)).collect::<String>())?;
        return Ok(0);
    }
    let mut table = Table::new(&[
        ("TEMPLATE", Align::Left),
        ("IMAGE", Align::Left),
        ("POINT", Align::Left),
        ("SIZE", Align::Right),
        ("CREATED", Align::Left),
        ("USED", Align::Left),
        ("PINNED", Align::Left),
    ]);
    let now = SystemTime::now();
    for listed in &listed {
        let record = listed.record.as_ref().ok();
        let said =
            |of: fn(&TemplateRecord) -> String, else_: &str| record.map_or_else(|| else_.to_owned(), of);
        table.row([
            if args.keys { listed.key.to_string() } else { short(&listed.key) },
            said(image, ""),
            said(|record| record.point.to_string(), "damaged"),
            size::human(listed.allocated_bytes),
            record.map_or_else(String::new, |record| span::ago(record.created(), now)),
            span::ago(listed.used, now),
            if listed.pinned { "yes".to_owned() } else { String::new() },
        ]);
    }
    failure::print(table)?;
    Ok(0)
}

fn short(key: &TemplateKey) -> String {
    key.as_str().chars().take(SHORT).collect()
}

/// What the host says that it was made from.
fn image(record: &TemplateRecord) -> String {
    record.description.get("image").and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn inspect(args: &InspectArgs, templates: &Templates) -> Result<u8> {
    let mut listed = Vec::new();
    for digits in &args.templates {
        let found = templates.inspect(&templates.resolve(digits)?)?;
        // It may have gone between the two.
        listed.push(found.ok_or_else(|| TemplateError::Unknown(Printable::new(digits)))?);
    }
    if args.json {
        return print_json(&listed.iter().map(as_json).collect());
    }
    for (number, listed) in listed.iter().enumerate() {
        let gap = if number > 0 { "\n" } else { "" };
        failure::print(format_args!("{gap}{}", in_words(listed)?))?;
    }
    Ok(0)
}

fn in_words(listed: &Listed) -> Result<String> {
    let mut lines: Vec<(&str, String)> = vec![
        ("key", listed.key.to_string()),
        ("used", rfc3339_of(listed.used)),
        ("pinned", if listed.pinned { "yes" } else { "no" }.to_owned()),
        ("on disk", size::human(listed.allocated_bytes)),
    ];
    match &listed.record {
        Err(damage) => lines.push(("damaged", said(damage))),
        Ok(record) => {
            lines.push(("created", rfc3339_of(record.created())));
            lines.push(("point", record.point.to_string()));
            for part in Part::ALL {
                let published = record.part(part);
                let verity = if published.verity { ", fs-verity" } else { "" };
                let (length, taken) = (size::human(published.bytes), size::human(published.allocated_bytes));
                let text = format!("{length}, {taken} on disk, {}{verity}", published.digest);
                lines.push((part.name(), text));
            }
            let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            match record.description.as_object() {
                Some(members) => {
                    lines.extend(members.iter().map(|(name, value)| (name.as_str(), text(value))))
                }
                None => lines.push(("description", text(&record.description))),
            }
        }
    }
    if let Some(bytes) = listed.working_set_bytes {
        lines.push(("working set", size::human(bytes)));
    }
    let width = lines.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    let line =
        |(name, text): (&str, String)| format!("{:<width$}  {}\n", one_line(name, 80), one_line(&text, 4000));
    Ok(lines.into_iter().map(line).collect())
}

/// Does the same to each of these templates, and says of each that it was done.
fn each(
    templates: &Templates,
    named: &[String],
    done: &str,
    what: fn(&Templates, &TemplateKey) -> Result<(), TemplateError>,
) -> Result<u8> {
    for digits in named {
        let key = templates.resolve(digits)?;
        what(templates, &key)?;
        failure::print(format_args!("{done} {key}\n"))?;
    }
    Ok(0)
}

fn verify(args: &VerifyArgs, templates: &Templates) -> Result<u8> {
    let keys: Vec<TemplateKey> = match args.templates.as_slice() {
        [] => templates.list()?.into_iter().map(|listed| listed.key).collect(),
        named => named.iter().map(|digits| templates.resolve(digits)).collect::<Result<_, _>>()?,
    };
    let (mut all, mut status) = (Vec::new(), 0);
    for key in keys {
        // One that was removed meanwhile needs no verdict.
        let Some(verified) = templates.verify(&key)? else { continue };
        let damage = verified.damage.as_ref().map(said);
        if damage.is_some() {
            status = failure::FAILED;
        }
        if args.json {
            all.push(
                json!({ "key": key.as_str(), "status": status_word(damage.is_some()), "damage": damage }),
            );
        } else {
            let why = damage.as_ref().map_or_else(String::new, |why| format!(", thrown away: {why}"));
            failure::print(format_args!("{} {key}{why}\n", status_word(damage.is_some())))?;
        }
    }
    if args.json {
        print_json(&all)?;
    }
    Ok(status)
}

fn prune(args: &PruneArgs, templates: &Templates) -> Result<u8> {
    let policy = TemplatePolicy {
        all: args.all,
        older_than: args.older_than,
        most_bytes: args.max_size,
        spare_used: false,
        dry_run: args.dry_run,
    };
    let pruned = templates.prune(&policy)?;
    if args.json {
        let object = json!({
            "templates": keys(&pruned),
            "freed_bytes": pruned.bytes,
            "dry_run": args.dry_run,
        });
        failure::print(format_args!("{}\n", serde_json::to_string_pretty(&object)?))?;
        return Ok(0);
    }
    let verb = if args.dry_run { "would remove" } else { "removed" };
    for template in &pruned.templates {
        failure::print(format_args!("{verb} {}\n", template.key))?;
    }
    let count = match pruned.templates.len() {
        1 => "1 template".to_owned(),
        many => format!("{many} templates"),
    };
    failure::print(format_args!("{verb} {count}, {}\n", size::human(pruned.bytes)))?;
    Ok(0)
}

/// The keys of what was pruned.
pub(super) fn keys(pruned: &PrunedTemplates) -> Vec<&str> {
    pruned.templates.iter().map(|template| template.key.as_str()).collect()
}

fn status_word(damaged: bool) -> &'static str {
    if damaged { "damaged" } else { "sound" }
}

/// The damage and what caused it, in one line.
fn said(damage: &Damage) -> String {
    one_line(&chain(damage), 2000)
}

fn as_json(listed: &Listed) -> Value {
    let record = listed.record.as_ref().ok();
    let files: Option<Map<String, Value>> = record.map(|record| {
        let file = |part: Part| {
            let published = record.part(part);
            let file = json!({
                "size_bytes": published.bytes,
                "allocated_bytes": published.allocated_bytes,
                "digest": published.digest.to_string(),
                "verity": published.verity,
            });
            (part.name().to_owned(), file)
        };
        Part::ALL.into_iter().map(file).collect()
    });
    json!({
        "key": listed.key.as_str(),
        "status": status_word(record.is_none()),
        "damage": listed.record.as_ref().err().map(said),
        "point": record.map(|record| record.point.to_string()),
        "created": record.map(|record| rfc3339_of(record.created())),
        "used": rfc3339_of(listed.used),
        "pinned": listed.pinned,
        "size_bytes": record.map(TemplateRecord::bytes),
        "allocated_bytes": listed.allocated_bytes,
        "working_set_bytes": listed.working_set_bytes,
        "files": files,
        "description": record.map(|record| &record.description),
    })
}

fn print_json(all: &Vec<Value>) -> Result<u8> {
    failure::print(format_args!("{}\n", serde_json::to_string_pretty(all)?))?;
    Ok(0)
}
