//! Commands on the store.

use std::collections::BTreeSet;
use std::time::SystemTime;

use anyhow::{Context, Result};
use carrel_host::timestamp::rfc3339_of;
use carrel_store::templates::TemplatePolicy;
use carrel_store::{Digest, PruneOptions};
use serde_json::{Value, json};

use super::run::without;
use super::{payload, place, template};
use crate::arguments::images::{ImagesArgs, PruneArgs, PullArgs, RmiArgs};
use crate::arguments::run::Pull;
use crate::configuration::Configuration;
use crate::failure;
use crate::table::{Align, Table};
use crate::values::{size, span};

/// Digits of a digest that a table shows.
const SHORT: usize = 12;

/// `carrel pull`.
pub(crate) fn pull(args: &PullArgs, configuration: &Configuration) -> Result<u8> {
    let store = place::store(configuration)?;
    for image in &args.images {
        let wanted = payload::Wanted {
            image,
            pull: Pull::Always,
            platform: args.platform.as_deref(),
            insecure: args.insecure,
            without: without(args.unconfined.as_ref()),
            patience: configuration.patience,
        };
        let (acquired, _lease) = payload::Acquired::find(&store, &wanted)?;
        let pulled = acquired.image;
        if args.quiet {
            failure::print(format_args!("{}\n", pulled.digest))?;
        } else {
            failure::print(format_args!(
                "{}  {}  {}\n",
                pulled.name,
                pulled.digest,
                size::human(pulled.size_bytes)
            ))?;
        }
    }
    Ok(0)
}

/// `carrel images`.
pub(crate) fn images(args: &ImagesArgs, configuration: &Configuration) -> Result<u8> {
    let images = place::store(configuration)?.images()?;
    if args.json {
        let all: Vec<Value> = images
            .iter()
            .map(|image| {
                json!({
                    "name": image.name,
                    "digest": image.digest.to_string(),
                    "config_digest": image.config_digest.to_string(),
                    "layers": image.layers.len(),
                    "size_bytes": image.size_bytes,
                    "pulled": rfc3339_of(image.pulled),
                    "used": rfc3339_of(image.used),
                })
            })
            .collect();
        failure::print(format_args!("{}\n", serde_json::to_string_pretty(&all)?))?;
    } else if args.quiet {
        // An image may have several names; its digest is said once.
        let digests: BTreeSet<String> = images.iter().map(|image| image.digest.to_string()).collect();
        failure::print(digests.into_iter().map(|digest| digest + "\n").collect::<String>())?;
    } else {
        let mut table = Table::new(&[
            ("IMAGE", Align::Left),
            ("DIGEST", Align::Left),
            ("SIZE", Align::Right),
            ("PULLED", Align::Left),
        ]);
        let now = SystemTime::now();
        for image in &images {
            let digest = image.digest.to_string();
            let short = || digest.split(':').next_back().unwrap_or_default().chars().take(SHORT).collect();
            table.row([
                image.name.clone(),
                if args.digests { digest.clone() } else { short() },
                size::human(image.size_bytes),
                span::ago(image.pulled, now),
            ]);
        }
        failure::print(table)?;
    }
    Ok(0)
}

/// `carrel rmi`.
pub(crate) fn rmi(args: &RmiArgs, configuration: &Configuration) -> Result<u8> {
    let store = place::store(configuration)?;
    for image in &args.images {
        for name in store.remove(image)? {
            failure::print(format_args!("removed {name}\n"))?;
        }
    }
    Ok(0)
}

/// `carrel prune`.
pub(crate) fn prune(args: &PruneArgs, configuration: &Configuration) -> Result<u8> {
    let home = place::home(configuration)?;
    let store = place::store(configuration)?;
    let now = SystemTime::now();
    let mut keep = BTreeSet::new();
    let mut removed = Vec::new();
    for room in home.rooms()? {
        let record = room.record();
        if room.has_ended() {
            let ended =
                SystemTime::UNIX_EPOCH + std::time::Duration::from_millis(record.ended_ms.unwrap_or(0));
            let old =
                args.older_than.is_none_or(|least| now.duration_since(ended).is_ok_and(|age| age >= least));
            if old {
                if !args.dry_run {
                    room.remove()?;
                }
                removed.push(room.id().to_string());
            }
            continue;
        }
        let payload = &room.spec().payload;
        let named = payload
            .layers
            .iter()
            .map(|layer| &layer.digest)
            .chain(payload.zips.iter().map(|zip| &zip.digest));
        for digest in named {
            let digest: Digest =
                digest.parse().context("A room's record names something that is no digest.")?;
            keep.insert(digest);
        }
    }
    let options = PruneOptions {
        all: args.all,
        older_than: args.older_than,
        dry_run: args.dry_run,
        keep,
        ..PruneOptions::default()
    };
    let pruned = store.prune(&options)?;
    let policy = TemplatePolicy {
        all: args.all,
        older_than: args.older_than.filter(|_| args.all),
        most_bytes: None,
        spare_used: false,
        dry_run: args.dry_run,
    };
    let templates = store.templates().prune(&policy)?;
    let freed = pruned.bytes.saturating_add(templates.bytes);
    if args.json {
        let object = json!({
            "rooms": removed,
            "images": pruned.images,
            "blobs": pruned.blobs.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "templates": template::keys(&templates),
            "freed_bytes": freed,
            "dry_run": args.dry_run,
        });
        failure::print(format_args!("{}\n", serde_json::to_string_pretty(&object)?))?;
        return Ok(0);
    }
    let verb = if args.dry_run { "would remove" } else { "removed" };
    let keys: Vec<String> = template::keys(&templates).into_iter().map(str::to_owned).collect();
    for (kind, names) in [("room", &removed), ("image", &pruned.images), ("template", &keys)] {
        for name in names {
            failure::print(format_args!("{verb} {kind} {name}\n"))?;
        }
    }
    let (blobs, freed) = (pruned.blobs.len(), size::human(freed));
    failure::print(format_args!("{verb} {blobs} blobs, {freed}\n"))?;
    Ok(0)
}
