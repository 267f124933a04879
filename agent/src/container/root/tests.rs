//! The pure parts, and a whole root, entered by a thread with a mount namespace of its own. The latter needs root.

use std::collections::BTreeSet;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};

use carrel_protocol::agent::{Failure, Tmpfs};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use tempfile::TempDir;

use super::*;

#[test]
fn places_are_absolute_and_below_the_root() {
    for right in ["/data", "/a/b", "/a//b", "/a/./b", "/a/"] {
        assert!(absolute(right, "volume").is_ok(), "{right}");
    }
    for wrong in ["", "data", "./data", "/", "//", "/.", "/..", "/a/../b", "../a"] {
        let error = absolute(wrong, "volume").unwrap_err();
        assert_eq!(error.failure(), Failure::BadRequest);
        assert!(error.to_string().contains(&format!("'{wrong}' is no place for a volume")));
    }
}

#[test]
fn settings_of_the_rooms_kernel_are_refused_before_anything_is_written() {
    for name in [
        "kernel.core_pattern",
        "kernel.hostname",
        "kernel.shm/../core_pattern",
        "kernel.shm..core_pattern",
        "net.../kernel/core_pattern",
        "net/ipv4/ip_forward",
        "vm.drop_caches",
        "fs.file-max",
        "kernel.semaphore",
        "Net.core",
        "",
        "net.a\0b",
    ] {
        let surroundings =
            Surroundings { sysctls: [(name.to_owned(), "1".to_owned())].into(), ..Surroundings::default() };
        let error = settings(&surroundings).unwrap_err();
        assert_eq!(error.failure(), Failure::BadRequest, "{name}");
    }
}

#[test]
fn mounts_come_after_those_that_they_lie_in() {
    for (number, row) in MOUNTS.iter().enumerate() {
        let inside = |other: &&Row| row.at.starts_with(&format!("{}/", other.at));
        assert!(!MOUNTS[number..].iter().any(|later| inside(&later)), "{}", row.at);
        assert!(row.flags.contains(MountFlags::NOSUID), "{}", row.at);
    }
}

/// Enters a root in a thread with namespaces of its own, and looks around there.
fn entered(
    image: &TempDir,
    surroundings: Surroundings,
    look: impl FnOnce(Result<(), StartError>) + Send + 'static,
) {
    entered_with(SetIds::Honoured, None, image, surroundings, look);
}

fn entered_with(
    set_ids: SetIds,
    clone_socket: Option<PathBuf>,
    image: &TempDir,
    surroundings: Surroundings,
    look: impl FnOnce(Result<(), StartError>) + Send + 'static,
) {
    let rootfs = image.path().to_owned();
    let done = std::thread::spawn(move || {
        let own = UnshareFlags::NEWNS | UnshareFlags::NEWUTS | UnshareFlags::NEWIPC;
        // SAFETY: no table of descriptors is unshared.
        unsafe { unshare_unsafe(own) }.unwrap();
        let taken = clone_socket.map(|folder| take_along(&folder).unwrap());
        let (hostname, clone_socket) = ("reading-room", taken.as_ref());
        let root = Root { surroundings: &surroundings, set_ids, hostname, clone_socket };
        look(enter(&rootfs).and_then(|names| furnish(&root, names)));
    });
    if let Err(panic) = done.join() {
        std::panic::resume_unwind(panic);
    }
}

fn refuses(path: &str) -> Option<i32> {
    fs::write(path, "1").err().and_then(|error| error.raw_os_error())
}

#[test]
fn a_container_finds_what_programs_expect_and_nothing_of_the_old_root() {
    let image = TempDir::new().unwrap();
    fs::create_dir(image.path().join("etc")).unwrap();
    // What an image brings must neither be followed nor written through.
    let outside = TempDir::new().unwrap();
    fs::write(outside.path().join("secret"), "kept").unwrap();
    symlink(outside.path().join("secret"), image.path().join("etc/hostname")).unwrap();
    fs::write(image.path().join("etc/hosts"), "of the image").unwrap();
    fs::hard_link(image.path().join("etc/hosts"), image.path().join("other-name")).unwrap();
    let old_root = image.path().to_owned();
    entered(&image, Surroundings::default(), move |done| {
        done.unwrap();
        assert!(!old_root.exists());
        let mut names: Vec<_> = fs::read_dir("/")
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["dev", "etc", "other-name", "proc", "sys"]);
        assert_eq!(fs::read_to_string("/etc/hostname").unwrap(), "reading-room\n");
        assert!(fs::read_to_string("/etc/hosts").unwrap().contains("127.0.1.1\treading-room\n"));
        assert_eq!(fs::read_to_string("/other-name").unwrap(), "of the image");
        assert_eq!(rustix::system::uname().nodename().to_bytes(), b"reading-room");

        let null = fs::metadata("/dev/null").unwrap();
        assert!(null.file_type().is_char_device());
        assert_eq!((null.rdev(), null.mode() & 0o7777), (rustix::fs::makedev(1, 3), 0o666));
        assert_eq!(fs::read_link("/dev/stdin").unwrap(), Path::new("/proc/self/fd/0"));
        assert_eq!(fs::metadata("/dev/shm").unwrap().permissions().mode() & 0o7777, 0o1777);
        assert!(fs::metadata("/dev/ptmx").unwrap().file_type().is_char_device());
        fs::write("/dev/shm/x", "writable").unwrap();
        fs::write("/file", "writable").unwrap();

        assert_eq!(refuses("/proc/sys/kernel/domainname"), Some(libc::EROFS));
        assert_eq!(refuses("/sys/new"), Some(libc::EROFS));
        // Not every kernel has these.
        assert!(matches!(refuses("/proc/sysrq-trigger"), Some(libc::EROFS | libc::ENOENT)));
        assert!(fs::read("/proc/keys").unwrap_or_default().is_empty());
        assert!(fs::read_dir("/sys/firmware").map_or(0, Iterator::count) == 0);
    });
    assert_eq!(fs::read_to_string(outside.path().join("secret")).unwrap(), "kept");
    assert!(image.path().join("file").exists());
    assert_eq!(fs::read_dir(image.path().join("dev")).unwrap().count(), 0);
}

#[test]
fn links_of_an_image_lead_nowhere_but_into_it() {
    let image = TempDir::new().unwrap();
    let outside = TempDir::new().unwrap();
    for name in ["etc", "dev", "data"] {
        symlink(outside.path(), image.path().join(name)).unwrap();
    }
    // They dangle inside, and directories cannot be made of such: an error, not a way out.
    entered(&image, Surroundings::default(), |done| {
        assert!(matches!(done, Err(StartError::InTheWay { .. })));
    });
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);

    let image = TempDir::new().unwrap();
    fs::create_dir(image.path().join("inner")).unwrap();
    symlink("/inner", image.path().join("etc")).unwrap();
    entered(&image, Surroundings::default(), |done| done.unwrap());
    assert!(image.path().join("inner/hosts").exists());
}

#[test]
fn an_image_that_has_something_else_in_the_place_of_a_containers_own_is_at_fault() {
    let file = |image: &Path, name: &str| fs::write(image.join(name), "").unwrap();
    let folder = |image: &Path, name: &str| fs::create_dir_all(image.join(name)).unwrap();
    let link = |image: &Path, name: &str, target: &str| symlink(target, image.join(name)).unwrap();
    type Make<'a> = &'a dyn Fn(&Path);
    let cases: [(&str, Make<'_>); 7] = [
        ("/dev", &|image| file(image, "dev")),
        ("/proc", &|image| file(image, "proc")),
        ("/sys", &|image| link(image, "sys", "sys")),
        ("/etc", &|image| file(image, "etc")),
        ("/etc/hostname", &|image| link(image, "etc", "/proc/1")),
        ("/etc/hosts", &|image| folder(image, "etc/hosts/full")),
        ("/data", &|image| file(image, "data")),
    ];
    for (path, make) in cases {
        let image = TempDir::new().unwrap();
        make(image.path());
        let surroundings = Surroundings { volumes: vec!["/data".into()], ..Surroundings::default() };
        entered(&image, surroundings, move |done| {
            let error = done.unwrap_err();
            assert_eq!(error.failure(), Failure::BadPayload, "{path}: {error}");
            assert!(error.to_string().contains(&format!(" {path}: ")), "{error}");
        });
    }
}

/// What covers parts of /proc goes by its path, so a link of the image's there would leave it uncovered: on the root, to be reached by `/..`, or below
/// the container's own /dev, where the kernel takes it for one that may be mounted again.
#[test]
fn no_link_of_an_images_leads_a_file_system_elsewhere() {
    for (name, target) in
        [("proc", "/"), ("proc", "/dev/shm"), ("proc", "inner"), ("dev", "/"), ("dev", "/proc"), ("sys", "/")]
    {
        let image = TempDir::new().unwrap();
        fs::create_dir_all(image.path().join("dev/shm")).unwrap();
        fs::create_dir_all(image.path().join("inner")).unwrap();
        fs::create_dir_all(image.path().join("self")).unwrap();
        fs::write(image.path().join("self/oom_score_adj"), "0").unwrap();
        if name == "dev" {
            fs::remove_dir_all(image.path().join("dev")).unwrap();
        }
        symlink(target, image.path().join(name)).unwrap();
        let surroundings = Surroundings { volumes: vec!["/proc/self".into()], ..Surroundings::default() };
        entered(&image, surroundings, move |done| {
            let error = done.unwrap_err();
            assert_eq!(error.failure(), Failure::BadPayload, "{name} -> {target}: {error}");
            assert!(error.to_string().contains(&format!(" /{name}: ")), "{error}");
        });
    }
}

#[test]
fn nothing_is_mounted_on_the_root() {
    for target in ["/", "/..", "/data/..", "../.."] {
        let image = TempDir::new().unwrap();
        fs::create_dir(image.path().join("data")).unwrap();
        symlink(target, image.path().join("over")).unwrap();
        let volume = Surroundings { volumes: vec!["/over".into()], ..Surroundings::default() };
        entered(&image, volume, |done| assert_eq!(done.unwrap_err().failure(), Failure::BadPayload));
        let tmpfs = vec![Tmpfs { path: "/over".into(), options: String::new() }];
        entered(&image, Surroundings { tmpfs, ..Surroundings::default() }, |done| {
            assert_eq!(done.unwrap_err().failure(), Failure::BadRequest);
        });
    }
    let (image, agents) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    fs::create_dir(image.path().join("run")).unwrap();
    symlink("/", image.path().join("run/carrel")).unwrap();
    let folder = Some(agents.path().to_owned());
    entered_with(SetIds::Honoured, folder, &image, Surroundings::default(), |done| {
        assert_eq!(done.unwrap_err().failure(), Failure::BadPayload);
    });
}

#[test]
fn a_tmpfs_where_the_image_has_a_file_is_a_wrong_request() {
    let image = TempDir::new().unwrap();
    fs::write(image.path().join("data"), "").unwrap();
    let tmpfs = vec![Tmpfs { path: "/data".into(), options: String::new() }];
    entered(&image, Surroundings { tmpfs, ..Surroundings::default() }, |done| {
        assert_eq!(done.unwrap_err().failure(), Failure::BadRequest);
    });
}

#[test]
fn a_tmpfs_on_the_devices_is_a_wrong_request() {
    let tmpfs = vec![Tmpfs { path: "/dev".into(), options: String::new() }];
    let surroundings = Surroundings { tmpfs, ..Surroundings::default() };
    entered(&TempDir::new().unwrap(), surroundings, |done| {
        let error = done.unwrap_err();
        assert!(error.failure() == Failure::BadRequest && error.to_string().contains("/dev"), "{error}");
    });
}

#[test]
fn a_shortage_is_not_the_images_fault() {
    let full = StartError::at(Path::new("/dev"), "a directory")(io::Error::from_raw_os_error(libc::ENOSPC));
    assert_eq!(full.failure(), Failure::DiskFull);
    let broken = StartError::at(Path::new("/dev"), "a directory")(io::Error::from_raw_os_error(libc::EIO));
    assert_eq!(broken.failure(), Failure::System);
}

#[test]
fn a_root_whose_set_ids_are_ignored_is_so_wherever_its_files_are() {
    for read_only_root in [false, true] {
        let image = TempDir::new().unwrap();
        fs::create_dir(image.path().join("data")).unwrap();
        let surroundings = Surroundings {
            read_only_root,
            volumes: vec!["/data".into()],
            tmpfs: vec![Tmpfs { path: "/tmp".into(), options: String::new() }],
            ..Surroundings::default()
        };
        let nosuid = |path: &str| {
            rustix::fs::statvfs(path).unwrap().f_flag.contains(rustix::fs::StatVfsMountFlags::NOSUID)
        };
        entered_with(SetIds::Ignored, None, &image, surroundings.clone(), move |done| {
            done.unwrap();
            assert!(["/", "/data", "/tmp", "/dev"].into_iter().all(nosuid));
            assert_eq!(refuses("/file").is_some(), read_only_root);
        });
        entered(&image, surroundings, move |done| {
            done.unwrap();
            assert!(!nosuid("/") && !nosuid("/data"));
        });
    }
}

#[test]
fn a_read_only_root_leaves_volumes_and_tmpfs_writable() {
    let image = TempDir::new().unwrap();
    fs::create_dir(image.path().join("data")).unwrap();
    fs::write(image.path().join("data/from-the-image"), "1").unwrap();
    let tmpfs = |path: &str, options: &str| Tmpfs { path: path.into(), options: options.into() };
    let surroundings = Surroundings {
        read_only_root: true,
        // In the wrong order: outer ones are to be mounted first all the same.
        volumes: vec!["/data/inner".into(), "/data".into()],
        tmpfs: vec![tmpfs("/data/inner/tmp", "size=64k,mode=700"), tmpfs("/scratch", "ro")],
        ..Surroundings::default()
    };
    entered(&image, surroundings, |done| {
        done.unwrap();
        assert_eq!(refuses("/file"), Some(libc::EROFS));
        assert_eq!(refuses("/etc/hosts"), Some(libc::EROFS));
        assert_eq!(refuses("/scratch/file"), Some(libc::EROFS));
        assert_eq!(fs::read_to_string("/data/from-the-image").unwrap(), "1");
        fs::write("/data/file", "2").unwrap();
        fs::write("/data/inner/file", "3").unwrap();
        fs::write("/data/inner/tmp/file", "4").unwrap();
        assert_eq!(fs::metadata("/data/inner/tmp").unwrap().mode() & 0o7777, 0o700);
        let full = fs::write("/data/inner/tmp/large", vec![0; 1 << 20]).unwrap_err();
        assert_eq!(full.raw_os_error(), Some(libc::ENOSPC));
    });
    assert_eq!(fs::read_to_string(image.path().join("data/inner/file")).unwrap(), "3");
    assert!(!image.path().join("data/inner/tmp/file").exists());
}

#[test]
fn a_setting_of_the_containers_own_is_made() {
    let image = TempDir::new().unwrap();
    let sysctls =
        [("kernel.shmmni".to_owned(), "4001".to_owned()), ("fs.mqueue.msg_max".to_owned(), "11".to_owned())];
    let surroundings = Surroundings { sysctls: sysctls.into(), ..Surroundings::default() };
    entered(&image, surroundings, |done| {
        done.unwrap();
        assert_eq!(fs::read_to_string("/proc/sys/kernel/shmmni").unwrap(), "4001\n");
        assert_eq!(fs::read_to_string("/proc/sys/fs/mqueue/msg_max").unwrap(), "11\n");
        assert_eq!(refuses("/proc/sys/kernel/shmmni"), Some(libc::EROFS));
    });
    assert_ne!(fs::read_to_string("/proc/sys/kernel/shmmni").unwrap(), "4001\n");
}

#[test]
fn a_wrong_request_is_refused_before_anything_is_made_of_it() {
    let image = TempDir::new().unwrap();
    for surroundings in [
        Surroundings { volumes: vec!["/..".into()], ..Surroundings::default() },
        Surroundings {
            tmpfs: vec![Tmpfs { path: "/t".into(), options: "odd".into() }],
            ..Surroundings::default()
        },
    ] {
        entered(&image, surroundings, move |done| {
            assert_eq!(done.unwrap_err().failure(), Failure::BadRequest);
        });
    }
    // What every container has, it has; volumes and tmpfs there are none.
    let made: BTreeSet<_> =
        fs::read_dir(image.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(made, ["dev", "etc", "proc", "sys"].map(Into::into).into());
}

#[test]
fn the_clone_socket_is_there_for_everybody_and_its_folder_is_nobodys() {
    use std::io::{Read, Write};
    let (image, agents) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let name = Path::new(CLONE_SOCKET).file_name().unwrap();
    let socket = agents.path().join(name);
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).unwrap();
    let agent = std::thread::spawn(move || {
        let (mut program, _) = listener.accept().unwrap();
        let mut said = [0; 6];
        program.read_exact(&mut said).unwrap();
        said
    });
    let surroundings = Surroundings {
        read_only_root: true,
        tmpfs: vec![Tmpfs { path: "/run".into(), options: String::new() }],
        ..Surroundings::default()
    };
    entered_with(SetIds::Honoured, Some(agents.path().to_owned()), &image, surroundings, |done| {
        done.unwrap();
        assert_eq!(refuses("/run/carrel/new"), Some(libc::EROFS));
        fs::write("/run/new", "").unwrap();
        // A user without any rights.
        rustix::thread::set_thread_uid(rustix::fs::Uid::from_raw(1234)).unwrap();
        let mut agent = std::os::unix::net::UnixStream::connect(CLONE_SOCKET).unwrap();
        agent.write_all(b"ready\n").unwrap();
    });
    assert_eq!(&agent.join().unwrap(), b"ready\n");
}

#[test]
fn a_running_container_gets_another_name_even_below_a_read_only_root() {
    for own_hosts in [false, true] {
        let image = TempDir::new().unwrap();
        let rootfs = image.path().to_owned();
        let surroundings = Surroundings { read_only_root: true, ..Surroundings::default() };
        entered(&image, surroundings, move |done| {
            done.unwrap();
            assert_eq!(refuses("/etc/hosts"), Some(libc::EROFS));
            assert_eq!(rustix::system::uname().nodename().to_bytes(), b"reading-room");
        });
        if own_hosts {
            fs::write(rootfs.join("etc/hosts"), "127.0.0.1 of-its-own\n").unwrap();
        }
        let renamed = std::thread::spawn(move || {
            let own = UnshareFlags::NEWNS | UnshareFlags::NEWUTS | UnshareFlags::FS;
            // SAFETY: no table of descriptors is unshared.
            unsafe { unshare_unsafe(own) }.unwrap();
            rename(&rootfs, "reading-room", "second-room").unwrap();
            assert_eq!(rustix::system::uname().nodename().to_bytes(), b"second-room");
            assert_eq!(fs::read_to_string("/etc/hostname").unwrap(), "second-room\n");
            fs::read_to_string("/etc/hosts").unwrap()
        });
        let hosts = renamed.join().unwrap();
        assert_eq!(hosts.contains("of-its-own"), own_hosts, "{hosts}");
        assert_eq!(hosts.contains("127.0.1.1\tsecond-room\n"), !own_hosts, "{hosts}");
    }
}

#[test]
fn a_name_is_not_written_through_what_a_workload_put_in_its_place() {
    let (image, outside) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    fs::create_dir(image.path().join("etc")).unwrap();
    let kept = outside.path().join("kept");
    fs::write(&kept, "old\n").unwrap();
    symlink(&kept, image.path().join("etc/hostname")).unwrap();
    let rootfs = image.path().to_owned();
    let done = std::thread::spawn(move || {
        // SAFETY: no table of descriptors is unshared.
        unsafe { unshare_unsafe(UnshareFlags::NEWUTS | UnshareFlags::FS) }.unwrap();
        rename(&rootfs, "old", "new").unwrap();
        assert!(fs::symlink_metadata("/etc/hostname").unwrap().is_symlink());
        assert!(!Path::new("/etc/hosts").exists());
    });
    done.join().unwrap();
    assert_eq!(fs::read_to_string(kept).unwrap(), "old\n");
}

#[test]
fn a_volume_that_leads_to_proc_uncovers_nothing() {
    let image = TempDir::new().unwrap();
    symlink("/proc", image.path().join("data")).unwrap();
    symlink("/sys", image.path().join("more")).unwrap();
    let volumes = ["/data".to_owned(), "/more".to_owned()].into();
    entered(&image, Surroundings { volumes, ..Surroundings::default() }, |done| {
        done.unwrap();
        for place in ["/proc", "/data"] {
            assert_eq!(refuses(&format!("{place}/sys/kernel/core_pattern")), Some(libc::EROFS), "{place}");
        }
        assert_eq!(fs::read_dir("/more/firmware").map_or(0, Iterator::count), 0);
    });
}
