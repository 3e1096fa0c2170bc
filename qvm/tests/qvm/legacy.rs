//! The tools of R3.2, and files to a qube.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use filecopy::{receive, Characters, Limits, Tree};

use crate::run::Rig;

#[test]
fn f8_qfile_daemon_dvm_takes_the_arguments_of_r3_2() {
    let rig = Rig::of("qfile-daemon-dvm", &[]);
    // As typed: echo xterm | qfile-daemon-dvm qubes.VMShell dom0 DEFAULT red
    rig.run(&["qubes.VMShell", "dom0", "DEFAULT", "red"], "xterm\n")
        .is(7, "[--service][qubes.VMShell][--source][dom0][--label][red]\nxterm\n");
    rig.run(&["qubes.OpenInVM", "work", "root"], "")
        .is(7, "[--service][qubes.OpenInVM][--source][work][--user][root]\n");
    rig.run(&["qubes.VMShell", "dom0", "DEFAULT", "", ""], "")
        .is(7, "[--service][qubes.VMShell][--source][dom0]\n");
    rig.called();
    rig.run(&["qubes.VMShell", "dom0", "DEFAULT", "red", "/tmp/rules.xml"], "").fails(
        1,
        "qfile-daemon-dvm: error: a disposable with the rules of /tmp/rules.xml is not possible yet",
    );
    assert_eq!(rig.called(), "", "rather none than one without them");
    assert_eq!(rig.run(&["qubes.VMShell", "dom0"], "").status, 2);
}

/// dispvm-savefile answers 0 here.
fn rig_with_savefiles(table: &[(&str, &str)]) -> Rig {
    let rig = Rig::of("qvm-create-default-dvm", table);
    let path = rig.folder().join("dispvm-savefile");
    fs::remove_file(&path).unwrap();
    script(&path, "printf '[%s]' \"$@\" >> \"$LOG\"; echo >> \"$LOG\"");
    rig
}

fn script(path: &Path, line: &str) {
    fs::write(path, format!("#!/bin/sh\n{line}\n")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

const LIST: (&str, &str) = (
    "admin.vm.List dom0",
    "debian-12 class=TemplateVM state=Halted\ndom0 class=AdminVM state=Running\ndebian-12-dvm class=AppVM state=Halted\n\
     fedora class=TemplateVM state=Halted\nwork class=AppVM state=Running\n",
);

#[test]
fn a_default_dvm_is_made_with_its_savefile_and_becomes_the_default() {
    let rig = rig_with_savefiles(&[
        LIST,
        ("admin.property.Get+default_template dom0", "default=False type=vm fedora"),
        ("admin.property.Get+default_dispvm dom0", "default=False type=vm debian-12-dvm"),
        ("admin.vm.property.Get+template debian-12-dvm", "default=False type=vm debian-12"),
        ("admin.vm.Create.AppVM+fedora dom0 name=fedora-dvm label=gray", ""),
        ("admin.vm.feature.Set+internal fedora-dvm 1", ""),
        ("admin.vm.property.Set+template_for_dispvms fedora-dvm True", ""),
        ("admin.vm.property.Set+template_for_dispvms debian-12-dvm True", ""),
        ("admin.property.Set+default_dispvm dom0 fedora-dvm", ""),
        ("admin.property.Set+default_dispvm dom0 debian-12-dvm", ""),
    ]);
    rig.run(&["--default-template", "--default-script"], "").is(0, "");
    assert_eq!(rig.called(), "[build][fedora-dvm]\n");
    assert_eq!(
        rig.server.asked(),
        [
            "admin.property.Get+default_template dom0",
            "admin.vm.Create.AppVM+fedora dom0 name=fedora-dvm label=gray",
            "admin.vm.feature.Set+internal fedora-dvm 1",
            "admin.vm.property.Set+template_for_dispvms fedora-dvm True",
            "admin.property.Set+default_dispvm dom0 fedora-dvm",
        ]
    );
    // One that is there is made anew.
    for args in [&["debian-12", "hook.sh"][..], &["--used-template", "hook.sh"]] {
        rig.run(args, "").is(0, "");
        assert_eq!(rig.called(), "[build][debian-12-dvm][--prerun][hook.sh]\n");
        assert_eq!(
            rig.server.asked().last().unwrap(),
            "admin.property.Set+default_dispvm dom0 debian-12-dvm"
        );
    }
    rig.run(&["work"], "").fails(1, "qvm-create-default-dvm: error: \"work\" is no TemplateVM");
    rig.run(&[], "").fails(2, "qvm-create-default-dvm: error: TEMPLATE is required");
    rig.run(&["a", "b", "--default-script"], "")
        .fails(2, "qvm-create-default-dvm: error: one template and one script at most");
}

#[test]
fn a_savefile_that_is_not_made_leaves_the_default_as_it_was() {
    let rig =
        rig_with_savefiles(&[LIST, ("admin.vm.property.Set+template_for_dispvms debian-12-dvm True", "")]);
    script(&rig.folder().join("dispvm-savefile"), "exit 3");
    rig.run(&["debian-12"], "").is(3, "");
    assert!(!rig.server.asked().iter().any(|line| line.contains("default_dispvm")));
}

/// What stands for qubes.Filecopy in a qube: a program that has it on its standard input and output.
fn receiver(rig: &Rig, line: &str) {
    let path = rig.folder().join("qrexec-client");
    fs::remove_file(&path).unwrap();
    script(&path, &format!("printf '[%s]' \"$@\" > \"$LOG\"\n{line}"));
}

fn file(rig: &Rig) -> PathBuf {
    let path = rig.folder().join("report.txt");
    fs::write(&path, "text").unwrap();
    path
}

/// A receiver in this process, behind pipes with names: the files it takes are in `into`.
fn real_receiver(rig: &Rig, into: &Path) -> thread::JoinHandle<()> {
    let [there, back] = ["there", "back"].map(|name| rig.folder().join(name));
    assert!(Command::new("mkfifo").args([&there, &back]).status().unwrap().success());
    receiver(rig, &format!("cat {} & cat > {}; wait", back.display(), there.display()));
    let tree = Tree::open(into).unwrap();
    thread::spawn(move || {
        let (from, to) = (File::open(there).unwrap(), File::create(back).unwrap());
        receive(from, to, &tree, Characters::Displayable, &Limits::default()).unwrap();
    })
}

const DISPOSABLE: [(&str, &str); 2] = [
    ("admin.vm.List dom0", "disp1234 class=DispVM state=Running\n"),
    ("admin.vm.Start disp1234", "!QubesVMNotHaltedError Domain is not powered off: 'disp1234'"),
];

#[test]
fn l6_files_go_to_a_running_disposable_by_its_name() {
    let rig = Rig::of("qvm-copy-to-vm", &DISPOSABLE);
    let path = file(&rig);
    let into = tempfile::tempdir().unwrap();
    let receiving = real_receiver(&rig, into.path());
    rig.run(&["disp1234", path.to_str().unwrap()], "").is(0, "");
    receiving.join().unwrap();
    assert_eq!(rig.called(), "[-d][disp1234][-T][DEFAULT:QUBESRPC qubes.Filecopy dom0]");
    assert_eq!(fs::read_to_string(into.path().join("report.txt")).unwrap(), "text");
    assert!(path.exists());
}

#[test]
fn a_copy_that_does_not_arrive_is_told() {
    let rig = Rig::of("qvm-copy-to-vm", &DISPOSABLE);
    let path = file(&rig);
    let args = ["disp1234", path.to_str().unwrap()];
    receiver(&rig, "exit 126");
    rig.run(&args, "").fails(126, "qvm-copy-to-vm: error: the call of qubes.Filecopy was refused");
    receiver(&rig, "dd bs=16 count=1 if=/dev/zero 2> /dev/null; cat > /dev/null");
    rig.run(&args, "")
        .fails(1, "qvm-copy-to-vm: error: what has come is not what was sent (the checksums differ)");
    rig.run(&["nobody", "x"], "").fails(2, "qvm-copy-to-vm: error: no such domain: 'nobody'");
    assert_eq!(rig.run(&["disp1234"], "").status, 2);
}

#[test]
fn what_was_moved_is_here_until_it_is_there() {
    let rig = Rig::of("qvm-move-to-vm", &DISPOSABLE);
    let path = file(&rig);
    let args = ["disp1234", path.to_str().unwrap()];
    // EEXIST, and its name.
    let exists =
        r"printf '\021\000\000\000\000\000\000\000\000\000\000\000\000\000\000\000\004\000\000\000r\001pt'";
    receiver(&rig, exists);
    let ended = rig.run(&args, "");
    assert!(ended.status == 1 && ended.err.contains(r"a file named r\x01pt already exists"), "{}", ended.err);
    assert!(path.exists());
    let into = tempfile::tempdir().unwrap();
    let receiving = real_receiver(&rig, into.path());
    rig.run(&args, "").is(0, "");
    receiving.join().unwrap();
    assert_eq!(fs::read_to_string(into.path().join("report.txt")).unwrap(), "text");
    assert!(!path.exists());
}
