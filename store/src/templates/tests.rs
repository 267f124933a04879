//! One process's view: see `store/tests/templates.rs` for several.

use std::fs::{self, File, FileTimes, Permissions};
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use super::*;
use crate::Store;

const MEMORY: u64 = 8 << 20;
const DISK: u64 = 1 << 30;
/// Where the guest's one page of memory is that is not zeros.
const PAGE: u64 = 5 << 20;

struct Bed {
    _folder: tempfile::TempDir,
    root: PathBuf,
    templates: Templates,
}

fn bed() -> Bed {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("store");
    let templates = Templates::open(&root).unwrap();
    Bed { _folder: folder, root, templates }
}

fn key(of: u32) -> TemplateKey {
    TemplateKey::of(&json!({ "test": of })).unwrap()
}

fn maker(templates: &Templates, key: &TemplateKey) -> Maker {
    match templates.acquire(key, not_at_all).unwrap() {
        Acquired::Make(maker) => maker,
        other @ (Acquired::Ready(_) | Acquired::Busy) => panic!("{other:?}"),
    }
}

fn fill(maker: &mut Maker) {
    maker.state().unwrap().write_all_at(b"state of the VM", 0).unwrap();
    maker.memory(MEMORY).unwrap().write_all_at(&[7; 4096], PAGE).unwrap();
    let disk = maker.disk(DISK).unwrap();
    disk.write_all_at(b"superblock", 1024).unwrap();
    disk.write_all_at(b"backup", DISK - 6).unwrap();
}

fn make(templates: &Templates, key: &TemplateKey) -> Template {
    let mut maker = maker(templates, key);
    fill(&mut maker);
    maker.publish(Point::Unpacked, json!({ "image": "alpine:3.20", "domain": "default" })).unwrap()
}

impl Bed {
    fn file(&self, key: &TemplateKey, name: &str) -> PathBuf {
        self.root.join("templates").join(key.as_str()).join(name)
    }

    /// Writes to a published file, as a failing disk does.
    fn damage(&self, key: &TemplateKey, name: &str, how: impl FnOnce(&File)) {
        let path = self.file(key, name);
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        how(&File::options().read(true).write(true).open(path).unwrap());
    }

    /// Pretends that a template was last used so long ago.
    fn age(&self, key: &TemplateKey, age: Duration) {
        let file = File::open(self.file(key, RECORD)).unwrap();
        file.set_times(FileTimes::new().set_modified(SystemTime::now() - age)).unwrap();
    }

    fn fill_without(&self, maker: &mut Maker, part: Part) {
        fill(maker);
        fs::remove_file(self.templates.making().join(maker.key().as_str()).join(part.name())).unwrap();
    }

    /// How many files there are of a template that is being made.
    fn made_so_far(&self, key: &TemplateKey) -> usize {
        fs::read_dir(self.templates.making().join(key.as_str())).unwrap().count()
    }

    /// What is there beside whole templates.
    fn leftovers(&self) -> Vec<PathBuf> {
        let of = |folder: PathBuf| fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        of(self.templates.making()).chain(of(self.templates.going())).collect()
    }

    fn keys(&self) -> Vec<TemplateKey> {
        self.templates.keys().unwrap()
    }
}

fn flip(file: &File, offset: u64, bit: u8) {
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ (1 << bit)], offset).unwrap();
}

#[test]
fn what_is_published_is_found_whole_sparse_and_protected() {
    let bed = bed();
    let key = key(1);
    assert!(bed.templates.find(&key).unwrap().is_none());
    make(&bed.templates, &key);
    let listed = bed.templates.inspect(&key).unwrap().unwrap();
    assert_eq!(listed.used, listed.record.unwrap().created());
    let found = bed.templates.find(&key).unwrap().unwrap();
    let mut page = [0; 4097];
    found.file(Part::Memory).read_exact_at(&mut page, PAGE).unwrap();
    assert_eq!((page[0], page[4095], page[4096]), (7, 7, 0));
    let lengths = Part::ALL.map(|part| found.file(part).metadata().unwrap().len());
    assert_eq!(lengths, [15, MEMORY, DISK]);
    for part in Part::ALL {
        let metadata = found.file(part).metadata().unwrap();
        assert_eq!(metadata.mode() & 0o7777, 0o444, "{part}");
        let published = found.record().part(part);
        assert_eq!(published.allocated_bytes, metadata.blocks() * 512, "{part}");
        assert!(published.allocated_bytes < 1 << 20, "{part} is sparse");
        assert!(found.file(part).write_all_at(b"x", 0).is_err(), "{part} can be written");
    }
    let record = found.record();
    assert_eq!((&record.key, record.point, record.bytes()), (&key, Point::Unpacked, 15 + MEMORY + DISK));
    assert_eq!(record.description["image"], "alpine:3.20");
    assert!(record.created().elapsed().unwrap() < Duration::from_secs(60));
    assert!(found.verify().is_none());
    assert_eq!(fs::metadata(bed.file(&key, "")).unwrap().mode() & 0o7777, 0o700);
    assert!(bed.leftovers().is_empty());
}

#[test]
fn nobody_sees_a_template_that_is_being_made() {
    let bed = bed();
    let key = key(1);
    let mut making = maker(&bed.templates, &key);
    fill(&mut making);
    assert!(bed.templates.find(&key).unwrap().is_none() && bed.keys().is_empty());
    assert!(matches!(bed.templates.acquire(&key, not_at_all).unwrap(), Acquired::Busy));
    drop(maker(&bed.templates, &super::tests::key(2)));
    making.publish(Point::Initialised, Value::Null).unwrap();
    assert!(matches!(bed.templates.acquire(&key, not_at_all).unwrap(), Acquired::Ready(_)));
}

#[test]
fn a_maker_that_gives_up_leaves_nothing_and_its_failure_is_not_inherited() {
    let bed = bed();
    let key = key(1);
    let mut first = maker(&bed.templates, &key);
    fill(&mut first);
    let waits = AtomicUsize::new(0);
    thread::scope(|scope| {
        let second = scope.spawn(|| {
            bed.templates.acquire(&key, |_| {
                waits.fetch_add(1, Ordering::Relaxed);
                ControlFlow::Continue(())
            })
        });
        while waits.load(Ordering::Relaxed) < 2 {
            thread::sleep(Duration::from_millis(1));
        }
        drop(first);
        let mut second = match second.join().unwrap().unwrap() {
            Acquired::Make(maker) => maker,
            other @ (Acquired::Ready(_) | Acquired::Busy) => panic!("{other:?}"),
        };
        assert_eq!(bed.made_so_far(&key), 0, "it begins anew");
        fill(&mut second);
        second.publish(Point::Unpacked, Value::Null).unwrap();
    });
    assert!(bed.leftovers().is_empty());
}

#[test]
fn what_was_published_between_the_look_and_the_lock_is_not_made_again() {
    let bed = bed();
    make(&bed.templates, &key(1));
    assert!(matches!(bed.templates.claim(&key(1)).unwrap(), Some(Acquired::Ready(_))));
    assert!(bed.leftovers().is_empty());
}

#[test]
fn who_waits_is_asked_and_may_give_up() {
    let bed = bed();
    let key = key(1);
    let making = maker(&bed.templates, &key);
    let mut asked = Vec::new();
    let acquired = bed.templates.acquire(&key, |waited| {
        asked.push(waited);
        if asked.len() < 4 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    });
    assert!(matches!(acquired.unwrap(), Acquired::Busy));
    assert!(asked.is_sorted_by(|a, b| a < b), "{asked:?}");
    drop(making);
}

#[test]
fn what_is_not_complete_is_not_published_and_leaves_nothing() {
    type Spoil = fn(&Bed, &mut Maker);
    let cases: [(Spoil, &str); 6] = [
        (|_, maker| drop(maker.memory(MEMORY).unwrap()), "its state"),
        (|bed, maker| bed.fill_without(maker, Part::Disk), "its disk"),
        (|bed, maker| bed.fill_without(maker, Part::Memory), "its memory"),
        (
            |_, maker| {
                fill(maker);
                maker.state().unwrap();
            },
            "its state",
        ),
        (
            |_, maker| {
                fill(maker);
                maker.memory(MEMORY).unwrap().set_len(MEMORY - 1).unwrap();
            },
            "8388607 bytes",
        ),
        (
            |_, maker| {
                fill(maker);
                maker.disk(DISK).unwrap().set_len(DISK + 1).unwrap();
            },
            "1073741825 bytes",
        ),
    ];
    let bed = bed();
    for (spoil, said) in cases {
        let mut maker = maker(&bed.templates, &key(1));
        spoil(&bed, &mut maker);
        let error = maker.publish(Point::Unpacked, Value::Null).unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
        assert!(bed.leftovers().is_empty() && bed.keys().is_empty());
    }
}

#[test]
fn a_description_that_could_not_be_read_back_is_refused() {
    let bed = bed();
    let mut deep = json!(1);
    for _ in 0..200 {
        deep = json!([deep]);
    }
    for wrong in [json!("x".repeat(LARGEST_DESCRIPTION)), deep] {
        let mut maker = maker(&bed.templates, &key(1));
        fill(&mut maker);
        let error = maker.publish(Point::Unpacked, wrong).unwrap_err();
        assert!(matches!(error, TemplateError::Description), "{error}");
    }
    // Escaped to six times its length it is large, and fits.
    let mut maker = maker(&bed.templates, &key(1));
    fill(&mut maker);
    maker.publish(Point::Unpacked, json!("\u{1}".repeat(LARGEST_DESCRIPTION / 6 - 1))).unwrap();
    assert!(bed.templates.find(&key(1)).unwrap().is_some());
}

#[test]
fn a_file_may_be_begun_anew_before_it_is_published() {
    let bed = bed();
    let mut maker = maker(&bed.templates, &key(1));
    fill(&mut maker);
    let stale = maker.memory(4096).unwrap();
    let fresh = maker.memory(8192).unwrap();
    stale.write_all_at(&[1; 4096], 0).unwrap();
    fresh.write_all_at(&[2; 4096], 0).unwrap();
    let template = maker.publish(Point::Unpacked, Value::Null).unwrap();
    let mut bytes = [0; 8192];
    template.file(Part::Memory).read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!((bytes[0], bytes[4096]), (2, 0));
}

#[test]
fn what_is_in_use_outlives_its_removal() {
    let bed = bed();
    let key = key(1);
    let template = make(&bed.templates, &key);
    bed.templates.remove(&key).unwrap();
    assert!(bed.keys().is_empty() && bed.leftovers().is_empty());
    assert!(template.verify().is_none());
    assert!(matches!(bed.templates.remove(&key), Err(TemplateError::Unknown(_))));
    assert!(!template.discard(&Damage::Missing("disk")).unwrap(), "there is nothing to be discarded");
}

#[test]
fn what_can_be_seen_at_a_glance_is_found_damaged_and_thrown_away() {
    type Spoil = fn(&Bed, &TemplateKey);
    let cases: [Spoil; 10] = [
        |bed, key| bed.damage(key, "memory", |file| file.set_len(MEMORY - 4096).unwrap()),
        |bed, key| bed.damage(key, "disk", |file| file.set_len(DISK + 1).unwrap()),
        |bed, key| bed.damage(key, "state", |file| file.set_len(0).unwrap()),
        |bed, key| fs::remove_file(bed.file(key, "disk")).unwrap(),
        |bed, key| fs::remove_file(bed.file(key, RECORD)).unwrap(),
        |bed, key| bed.damage(key, RECORD, |file| file.set_len(0).unwrap()),
        |bed, key| bed.damage(key, RECORD, |file| file.set_len(1 << 20).unwrap()),
        |bed, key| {
            fs::rename(bed.file(key, "state"), bed.root.join("state")).unwrap();
            symlink(bed.root.join("state"), bed.file(key, "state")).unwrap();
        },
        |bed, key| bed.damage(key, "state", |open| flip(open, 14, 3)),
        // The record of another template, whole as it is.
        |bed, key| {
            make(&bed.templates, &super::tests::key(2));
            fs::rename(bed.file(&super::tests::key(2), RECORD), bed.file(key, RECORD)).unwrap();
            bed.templates.remove(&super::tests::key(2)).unwrap();
        },
    ];
    for (number, spoil) in cases.into_iter().enumerate() {
        let bed = bed();
        make(&bed.templates, &key(1));
        spoil(&bed, &key(1));
        let listed = bed.templates.inspect(&key(1)).unwrap().unwrap();
        assert!(listed.record.is_err(), "{number} looks whole");
        assert!(bed.templates.find(&key(1)).unwrap().is_none(), "{number} was found");
        assert!(bed.keys().is_empty() && bed.leftovers().is_empty(), "{number} stays");
        make(&bed.templates, &key(1));
    }
}

#[test]
fn verify_finds_a_flipped_bit_wherever_it_is_and_throws_only_that_template_away() {
    let bed = bed();
    make(&bed.templates, &key(2));
    // Data, a hole, zeros beside data, the last byte.
    let places: [(&str, &[u64]); 4] = [
        ("state", &[0, 14]),
        ("memory", &[PAGE, PAGE + 4095, 0, MEMORY - 1, PAGE + 4096]),
        ("disk", &[1024, 512 << 20, DISK - 1]),
        (RECORD, &[0, 20, 100, 200, 400]),
    ];
    for (file, offsets) in places {
        for (bit, offset) in (0_u8..).zip(offsets) {
            make(&bed.templates, &key(1));
            assert!(bed.templates.verify(&key(1)).unwrap().unwrap().damage.is_none());
            bed.damage(&key(1), file, |open| flip(open, *offset, bit % 8));
            let damage = bed.templates.verify(&key(1)).unwrap().unwrap().damage;
            let said = damage.unwrap_or_else(|| panic!("{file} at {offset}: not found")).to_string();
            assert!(
                said.contains(file.trim_end_matches(".json").trim_start_matches("template."))
                    || file == RECORD,
                "{said}"
            );
            assert_eq!(bed.keys(), [key(2)]);
        }
    }
    assert!(bed.templates.verify(&key(2)).unwrap().unwrap().damage.is_none());
    assert!(bed.templates.verify(&key(1)).unwrap().is_none());
    assert!(bed.leftovers().is_empty());
}

#[test]
fn a_discarded_template_does_not_take_its_successor_with_it() {
    let bed = bed();
    let damage = Damage::Missing("disk");
    let first = make(&bed.templates, &key(1));
    let also_first = bed.templates.find(&key(1)).unwrap().unwrap();
    assert!(first.discard(&damage).unwrap());
    let second = make(&bed.templates, &key(1));
    assert!(!also_first.discard(&damage).unwrap() && !first.discard(&damage).unwrap());
    assert_eq!(bed.keys(), [key(1)]);
    assert!(second.discard(&damage).unwrap());
}

#[test]
fn pinned_templates_stay_until_they_are_unpinned_or_damaged() {
    let bed = bed();
    let everything = TemplatePolicy { all: true, most_bytes: Some(0), ..TemplatePolicy::default() };
    make(&bed.templates, &key(1));
    for _ in 0..2 {
        bed.templates.pin(&key(1)).unwrap();
    }
    assert!(bed.templates.list().unwrap()[0].pinned);
    assert!(matches!(bed.templates.remove(&key(1)), Err(TemplateError::Pinned(_))));
    assert_eq!(bed.templates.prune(&everything).unwrap(), PrunedTemplates::default());
    for _ in 0..2 {
        bed.templates.unpin(&key(1)).unwrap();
    }
    assert_eq!(bed.templates.prune(&everything).unwrap().templates.len(), 1);
    assert!(matches!(bed.templates.pin(&key(1)), Err(TemplateError::Unknown(_))));
    assert!(matches!(bed.templates.unpin(&key(1)), Err(TemplateError::Unknown(_))));
    make(&bed.templates, &key(1));
    bed.templates.pin(&key(1)).unwrap();
    bed.damage(&key(1), "state", |file| file.set_len(1).unwrap());
    assert!(bed.templates.find(&key(1)).unwrap().is_none() && bed.keys().is_empty());
}

#[test]
fn age_and_size_take_the_longest_unused_first_and_a_dry_run_tells_the_truth() {
    const HOUR: Duration = Duration::from_secs(3600);
    let bed = bed();
    for number in 0..4 {
        make(&bed.templates, &key(number));
        bed.age(&key(number), HOUR * (10 - number));
    }
    let listed = bed.templates.list().unwrap();
    assert_eq!(
        listed.iter().map(|listed| &listed.key).collect::<Vec<_>>(),
        [&key(3), &key(2), &key(1), &key(0)]
    );
    let each = listed[0].allocated_bytes;
    assert!(each > 0 && listed.iter().all(|listed| listed.allocated_bytes == each));
    let gone = |policy: &TemplatePolicy| {
        let would = bed.templates.prune(&TemplatePolicy { dry_run: true, ..policy.clone() }).unwrap();
        let did = bed.templates.prune(policy).unwrap();
        assert_eq!(would, did);
        assert_eq!(did.bytes, each * did.templates.len() as u64);
        did.templates.into_iter().map(|template| template.key).collect::<Vec<_>>()
    };
    assert!(gone(&TemplatePolicy::default()).is_empty());
    let older = |hours: u32| TemplatePolicy { older_than: Some(HOUR * hours), ..TemplatePolicy::default() };
    assert!(gone(&older(11)).is_empty());
    assert_eq!(gone(&older(10)), [key(0)]);
    // Its use makes 1 the youngest.
    bed.templates.find(&key(1)).unwrap().unwrap();
    let most = |count: u64| TemplatePolicy { most_bytes: Some(each * count), ..TemplatePolicy::default() };
    assert!(gone(&most(3)).is_empty());
    bed.templates.pin(&key(2)).unwrap();
    assert_eq!(gone(&most(2)), [key(3)]);
    assert_eq!(gone(&most(0)), [key(1)], "a pinned one counts and stays");
    assert_eq!(bed.keys(), [key(2)]);
}

#[test]
fn who_publishes_prunes_what_nobody_uses() {
    let bed = bed();
    let days = |days: u64| Duration::from_secs(days * 24 * 3600);
    let bounds = TemplateBounds { most_bytes: u64::MAX, unused_for: days(3) };
    let templates = bed.templates.clone().bounded(bounds);
    let [pinned, used, unused, recent] = [1, 2, 3, 4].map(key);
    for (key, age) in [(&pinned, 9), (&used, 8), (&unused, 7), (&recent, 2)] {
        make(&bed.templates, key);
        bed.age(key, days(age));
    }
    templates.pin(&pinned).unwrap();
    let template = templates.find(&used).unwrap().unwrap();
    // What a clone's VMM has.
    let clones = template.file(Part::Disk).try_clone().unwrap();
    drop(template);
    bed.age(&used, days(8));
    make(&templates, &key(5));
    let mut left = [&pinned, &used, &recent, &key(5)].map(Clone::clone);
    left.sort();
    assert_eq!(bed.keys(), left, "of those too old the one goes that nobody has open");
    drop(clones);
    // The newest stays, though it is too large by itself.
    let template = make(&templates.bounded(TemplateBounds { most_bytes: 0, ..bounds }), &key(6));
    let mut left = [&pinned, &key(6)].map(Clone::clone);
    left.sort();
    assert_eq!(bed.keys(), left);
    assert_eq!(template.verify().map(|damage| damage.to_string()), None);
}

#[test]
fn a_damaged_template_is_pruned_by_any_policy() {
    let bed = bed();
    make(&bed.templates, &key(1));
    bed.templates.pin(&key(1)).unwrap();
    bed.damage(&key(1), "disk", |file| file.set_len(0).unwrap());
    let pruned = bed.templates.prune(&TemplatePolicy::default()).unwrap();
    assert!(pruned.templates.len() == 1 && pruned.templates[0].damaged);
    assert!(bed.keys().is_empty());
}

#[test]
fn what_was_used_or_pinned_after_it_was_chosen_stays() {
    let bed = bed();
    make(&bed.templates, &key(1));
    bed.age(&key(1), Duration::from_secs(10));
    let chosen = bed.templates.inspect(&key(1)).unwrap().unwrap();
    bed.templates.find(&key(1)).unwrap().unwrap();
    assert!(!bed.templates.take_unused(&chosen).unwrap());
    let chosen = bed.templates.inspect(&key(1)).unwrap().unwrap();
    bed.templates.pin(&key(1)).unwrap();
    assert!(!bed.templates.take_unused(&chosen).unwrap());
    bed.templates.unpin(&key(1)).unwrap();
    assert!(bed.templates.take_unused(&chosen).unwrap());
}

#[test]
fn the_first_digits_of_a_key_do_if_they_are_nobody_elses() {
    let bed = bed();
    make(&bed.templates, &key(1));
    make(&bed.templates, &key(2));
    let digits = key(1).to_string();
    assert_eq!(bed.templates.resolve(&digits).unwrap(), key(1));
    assert_eq!(bed.templates.resolve(&digits[..12]).unwrap(), key(1));
    for unknown in
        ["", "abc", "making", "going", "../x", "ffffffffffff", &digits.to_uppercase(), &digits[..3]]
    {
        assert!(matches!(bed.templates.resolve(unknown), Err(TemplateError::Unknown(_))), "{unknown}");
    }
    let twin: String = digits[..63].chars().chain([if digits.ends_with('0') { '1' } else { '0' }]).collect();
    fs::create_dir(bed.file(&twin.parse().unwrap(), "")).unwrap();
    assert!(matches!(bed.templates.resolve(&digits[..63]), Err(TemplateError::Ambiguous(_))));
    assert_eq!(bed.templates.resolve(&digits).unwrap(), key(1));
}

#[test]
fn what_the_dead_left_is_swept_and_what_the_living_make_is_not() {
    let bed = bed();
    let mut living = maker(&bed.templates, &key(1));
    fill(&mut living);
    // What a kill leaves: a folder with files, and nobody's lock on it.
    for dead in
        [bed.templates.making().join(key(2).as_str()), bed.templates.going().join(format!("{}-7", key(3)))]
    {
        fs::create_dir(&dead).unwrap();
        fs::write(dead.join("memory"), [1; 5000]).unwrap();
    }
    assert_eq!(bed.templates.sweep(true).unwrap(), 2 * 8192);
    assert_eq!(bed.leftovers().len(), 3);
    Store::open(&bed.root).unwrap();
    assert_eq!(bed.leftovers(), [bed.templates.making().join(key(1).as_str())]);
    living.publish(Point::Unpacked, Value::Null).unwrap();
    assert!(bed.templates.find(&key(1)).unwrap().is_some());
}

#[test]
fn a_maker_finds_nothing_of_a_dead_one() {
    let bed = bed();
    let dead = bed.templates.making().join(key(1).as_str());
    fs::create_dir(&dead).unwrap();
    for name in ["state", "memory", "disk", "template.json", "more"] {
        fs::write(dead.join(name), b"of the dead").unwrap();
    }
    let maker = maker(&bed.templates, &key(1));
    assert_eq!(bed.made_so_far(&key(1)), 0);
    let error = maker.publish(Point::Unpacked, Value::Null).unwrap_err();
    assert!(matches!(error, TemplateError::Unmade(Part::State)), "{error}");
}

#[test]
fn foreign_names_among_templates_hide_nothing() {
    let bed = bed();
    make(&bed.templates, &key(1));
    let folder = bed.root.join("templates");
    fs::write(folder.join("note"), b"").unwrap();
    fs::write(folder.join("f".repeat(64)), b"").unwrap();
    fs::write(folder.join("making").join("note"), b"").unwrap();
    assert_eq!(bed.templates.list().unwrap().len(), 1);
    bed.templates.sweep(false).unwrap();
    assert!(bed.templates.find(&"f".repeat(64).parse().unwrap()).is_err());
}

#[test]
fn a_working_set_is_added_once_and_goes_with_its_template() {
    let bed = bed();
    let template = make(&bed.templates, &key(1));
    assert!(template.working_set().is_none());
    assert_eq!(bed.templates.inspect(&key(1)).unwrap().unwrap().working_set_bytes, None);
    // Of a crowd, one.
    let added = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let template = bed.templates.find(&key(1)).unwrap().unwrap();
                added.fetch_add(usize::from(template.add_working_set(b"pages").unwrap()), Ordering::Relaxed);
            });
        }
    });
    assert_eq!(added.into_inner(), 1);
    assert!(!template.add_working_set(b"others").unwrap(), "never written again");
    let mut read = [0; 5];
    template.working_set().unwrap().read_exact_at(&mut read, 0).unwrap();
    assert_eq!(&read, b"pages");
    let found = fs::metadata(bed.file(&key(1), "working-set")).unwrap();
    assert_eq!((found.mode() & 0o777, found.len()), (0o444, 5));
    assert_eq!(bed.templates.inspect(&key(1)).unwrap().unwrap().working_set_bytes, Some(5));
    assert!(template.verify().is_none(), "it is no part of what was published");
    bed.templates.remove(&key(1)).unwrap();
    assert!(!bed.file(&key(1), "").exists(), "nothing is left over");
    assert!(!template.add_working_set(b"late").unwrap(), "of a template that is gone");
    assert!(!bed.file(&key(1), "").exists());
}

#[test]
fn what_is_no_working_set_is_none_and_no_damage() {
    let bed = bed();
    let template = make(&bed.templates, &key(1));
    assert!(matches!(
        template.add_working_set(&vec![0; LARGEST_WORKING_SET + 1]),
        Err(TemplateError::Io { .. })
    ));
    assert!(template.working_set().is_none());
    // What a killed writer left.
    fs::write(bed.file(&key(1), "working-set.unfinished"), b"half").unwrap();
    symlink("/etc/passwd", bed.file(&key(1), "working-set")).unwrap();
    assert!(bed.templates.find(&key(1)).unwrap().unwrap().working_set().is_none(), "no link is followed");
    fs::remove_file(bed.file(&key(1), "working-set")).unwrap();
    fs::write(bed.file(&key(1), "working-set"), vec![0; LARGEST_WORKING_SET + 1]).unwrap();
    assert!(template.working_set().is_none(), "too long");
    fs::remove_file(bed.file(&key(1), "working-set")).unwrap();
    assert!(template.add_working_set(b"pages").unwrap());
    assert!(!bed.file(&key(1), "working-set.unfinished").exists());
}
