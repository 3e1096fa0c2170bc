//! The Admin API over a real socket, on state folders of their own.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use admin_api::client::{call_within, events};
use admin_api::lines::Property;
use admin_api::{ApiError, Request};
use control_plane::admin::server::{serve, Served};
use control_plane::clones::{Keeping, Lease};
use control_plane::qube::{Class, Dvm, Qube, Template};
use control_plane::state::State;

struct Qubes {
    folder: tempfile::TempDir,
    state: State,
    served: Option<Served>,
}

impl Qubes {
    /// A TemplateVM `debian-12`, DVM templates `debian-dvm` and `whonix-ws-dvm`, and a plain AppVM `work`.
    fn new() -> Qubes {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(&folder.path().join("state")).unwrap();
        template(&state, "debian-12");
        app(&state, "debian-dvm", "red", true);
        app(&state, "whonix-ws-dvm", "purple", true);
        app(&state, "work", "blue", false);
        let served = serve(&state, &folder.path().join("qubesd.sock")).unwrap();
        Qubes { folder, state, served: Some(served) }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("qubesd.sock")
    }

    fn send(&self, method: &str, on: &str, argument: &str, payload: &str) -> Result<String, ApiError> {
        let request = Request::new(method, on).argument(argument).payload(payload);
        let answer = call_within(&self.socket(), &request, Duration::from_secs(10))?;
        Ok(String::from_utf8(answer).unwrap())
    }

    fn ok(&self, method: &str, on: &str, argument: &str, payload: &str) -> String {
        self.send(method, on, argument, payload)
            .unwrap_or_else(|error| panic!("{method} {on} {argument}: {error}"))
    }

    /// The class of the exception and its message; `hung up` where the connection was closed.
    fn refused(&self, method: &str, on: &str, argument: &str, payload: &str) -> String {
        match self.send(method, on, argument, payload) {
            Err(ApiError::Empty) => "hung up".to_owned(),
            Err(ApiError::Exception(exception)) => {
                format!("{}: {}", exception.kind.name(), exception.message())
            }
            other => panic!("{method} {on} {argument}: {other:?}"),
        }
    }

    fn set(&self, on: &str, property: &str, value: &str) {
        self.ok("admin.vm.property.Set", on, property, value);
    }

    fn get(&self, on: &str, property: &str) -> (bool, String) {
        let answer = self.ok("admin.vm.property.Get", on, property, "");
        let Property { is_default, value, .. } = Property::decode(&answer).unwrap();
        (is_default, value)
    }

    fn dvm(&self, name: &str) -> Dvm {
        let Class::AppVM(dvm) = Qube::load(&self.state, name).unwrap().class else { panic!() };
        dvm
    }

    fn disposable(&self, dvm: &str) -> Lease {
        Lease::take(&self.state, dvm, "x", ("debian-12".into(), 1), Keeping::Launcher, None).unwrap()
    }
}

fn template(state: &State, name: &str) {
    let class = Class::TemplateVM(Template {
        generation: 1,
        root_hash: "0".into(),
        root_bytes: 1 << 30,
        kernel_hash: "0".into(),
        initrd_hash: "0".into(),
        cmdline: "quiet".into(),
    });
    Qube { name: name.into(), label: "black".into(), class }.save(state).unwrap();
}

fn app(state: &State, name: &str, label: &str, template_for_dispvms: bool) {
    let class = common::app(template_for_dispvms);
    Qube { name: name.into(), label: label.into(), class }.save(state).unwrap();
}

fn default(value: &str) -> (bool, String) {
    (true, value.to_owned())
}

fn set(value: &str) -> (bool, String) {
    (false, value.to_owned())
}

#[test]
fn l3_f7_a_running_disposable_is_listed_with_its_templates_label_and_gone_when_it_ends() {
    let qubes = Qubes::new();
    let lease = qubes.disposable("whonix-ws-dvm");
    let name = lease.number().to_string();
    let line =
        |list: &str| list.lines().find(|line| line.starts_with(&format!("{name} "))).map(str::to_owned);
    let list = qubes.ok("admin.vm.List", "dom0", "", "");
    assert!(list.starts_with("dom0 class=AdminVM state=Running uuid="), "{list}");
    assert!(list.contains("\ndebian-12 class=TemplateVM state=Halted "), "{list}");
    assert!(list.contains("\nwork class=AppVM state=Halted "), "{list}");
    assert!(line(&list).unwrap().starts_with(&format!("{name} class=DispVM state=Running ")), "{list}");
    assert_eq!(qubes.get(&name, "label"), set("purple"));
    assert_eq!(qubes.get(&name, "template"), set("whonix-ws-dvm"));
    assert_eq!(qubes.get(&name, "auto_cleanup"), set("True"));
    assert_eq!(qubes.get(&name, "dispid"), set(&lease.number().get().to_string()));
    assert!(qubes.ok("admin.vm.CurrentState", &name, "", "").ends_with(" power_state=Running"));
    assert!(qubes.ok("admin.vm.CurrentState", "work", "", "").starts_with("mem=0 mem_static_max=1048576 "));
    drop(lease);
    assert_eq!(line(&qubes.ok("admin.vm.List", "dom0", "", "")), None);
    assert!(qubes.refused("admin.vm.property.GetAll", &name, "", "").starts_with("QubesVMNotFoundError"));
}

#[test]
fn t3_template_for_dispvms_stays_while_a_disposable_runs_or_somebody_names_it() {
    let qubes = Qubes::new();
    let off = || qubes.refused("admin.vm.property.Set", "debian-dvm", "template_for_dispvms", "False");
    let lease = qubes.disposable("debian-dvm");
    assert!(off().starts_with("QubesVMInUseError"), "{}", off());
    assert!(qubes
        .refused("admin.vm.property.Reset", "debian-dvm", "template_for_dispvms", "")
        .contains("InUse"));
    drop(lease);
    qubes.set("work", "default_dispvm", "debian-dvm");
    assert!(off().contains("default_dispvm of work"), "{}", off());
    qubes.ok("admin.vm.property.Reset", "work", "default_dispvm", "");
    qubes.ok("admin.property.Set", "dom0", "default_dispvm", "debian-dvm");
    assert!(off().contains("the system's default_dispvm"), "{}", off());
    qubes.ok("admin.property.Reset", "dom0", "default_dispvm", "");
    qubes.set("debian-dvm", "template_for_dispvms", "off");
    assert!(!qubes.dvm("debian-dvm").template_for_dispvms, "written through");
    for yes in ["True", "true", "on", "1"] {
        qubes.set("work", "template_for_dispvms", "0");
        qubes.set("work", "template_for_dispvms", yes);
        assert!(qubes.dvm("work").template_for_dispvms, "{yes}");
    }
    assert!(qubes
        .refused("admin.vm.property.Set", "work", "default_dispvm", "debian-dvm")
        .contains("PropertyValue"));
}

#[test]
fn t4_t5_t6_the_qubes_own_default_dispvm_wins_over_the_systems() {
    let qubes = Qubes::new();
    assert_eq!(qubes.get("work", "default_dispvm"), default(""));
    qubes.ok("admin.property.Set", "dom0", "default_dispvm", "debian-dvm");
    assert_eq!(qubes.get("work", "default_dispvm"), default("debian-dvm"));
    qubes.set("work", "default_dispvm", "whonix-ws-dvm");
    assert_eq!(qubes.get("work", "default_dispvm"), set("whonix-ws-dvm"));
    assert_eq!(qubes.ok("admin.vm.property.GetDefault", "work", "default_dispvm", ""), "type=vm debian-dvm");
    qubes.set("work", "default_dispvm", "");
    assert_eq!(qubes.get("work", "default_dispvm"), set(""), "none is a value");
    qubes.ok("admin.vm.property.Reset", "work", "default_dispvm", "");
    assert_eq!(qubes.get("work", "default_dispvm"), default("debian-dvm"));
    assert!(qubes
        .refused("admin.property.Set", "dom0", "default_dispvm", "debian-12")
        .contains("PropertyValue"));
    assert!(qubes.refused("admin.property.Set", "dom0", "default_dispvm", "nobody").contains("VMNotFound"));
}

#[test]
fn t7_a_dvm_template_names_itself_and_its_disposables_have_its_settings() {
    let qubes = Qubes::new();
    qubes.set("whonix-ws-dvm", "default_dispvm", "whonix-ws-dvm");
    qubes.set("work", "provides_network", "1");
    qubes.set("whonix-ws-dvm", "netvm", "work");
    let (first, second) = (qubes.disposable("whonix-ws-dvm"), qubes.disposable("debian-dvm"));
    let (one, other) = (first.number().to_string(), second.number().to_string());
    assert_eq!(qubes.get(&one, "default_dispvm"), set("whonix-ws-dvm"));
    assert_eq!(qubes.get(&one, "netvm"), set("work"));
    assert_eq!(qubes.get(&other, "default_dispvm"), default("debian-dvm"));
    assert_eq!(qubes.get(&other, "netvm"), default(""));
    // N8: edits of one touch neither its template nor others.
    qubes.set(&one, "netvm", "");
    qubes.ok("admin.vm.firewall.Set", &one, "", "action=drop\n");
    assert_eq!(qubes.get(&one, "netvm"), set(""));
    assert_eq!(qubes.get(&one, "default_dispvm"), set("whonix-ws-dvm"));
    assert_eq!(qubes.get("whonix-ws-dvm", "netvm"), set("work"));
    assert_eq!(qubes.ok("admin.vm.firewall.Get", "whonix-ws-dvm", "", ""), "action=accept\n");
    assert_eq!(qubes.ok("admin.vm.firewall.Get", &one, "", ""), "action=drop\n");
    assert!(qubes.refused("admin.vm.property.Set", "work", "netvm", "work").contains("Loops"));
    assert!(qubes.refused("admin.vm.property.Set", "work", "provides_network", "no").contains("InUse"));
}

#[test]
fn l7_a_running_disposable_stays_as_its_template_was_and_the_next_one_is_as_it_is() {
    let qubes = Qubes::new();
    qubes.set("work", "provides_network", "1");
    qubes.set("debian-dvm", "netvm", "work");
    let lease = qubes.disposable("debian-dvm");
    qubes.set("debian-dvm", "netvm", "");
    qubes.ok("admin.vm.firewall.Set", "debian-dvm", "", "action=drop\n");
    let later = qubes.disposable("debian-dvm");
    let (first, next) = (lease.number().to_string(), later.number().to_string());
    assert_eq!((qubes.get(&first, "netvm"), qubes.get(&next, "netvm")), (set("work"), set("")));
    assert_eq!(qubes.ok("admin.vm.firewall.Get", &first, "", ""), "action=accept\n");
    assert_eq!(qubes.ok("admin.vm.firewall.Get", &next, "", ""), "action=drop\n");
    drop((lease, later));
    assert_eq!(fs::read_dir(qubes.state.disposables()).unwrap().count(), 0);
}

#[test]
fn t9_internal_and_other_features_are_found_where_they_are_looked_for() {
    let qubes = Qubes::new();
    let check = |how: &str, on: &str| qubes.send(&format!("admin.vm.feature.{how}"), on, "internal", "").ok();
    qubes.ok("admin.vm.feature.Set", "debian-dvm", "internal", "1");
    assert_eq!(check("Get", "debian-dvm").as_deref(), Some("1"));
    assert_eq!(check("Get", "work"), None);
    qubes.ok("admin.vm.feature.Set", "debian-12", "internal", "");
    assert_eq!(check("CheckWithTemplate", "work").as_deref(), Some(""));
    assert_eq!(check("CheckWithAdminVM", "work"), None);
    qubes.ok("admin.vm.feature.Set", "dom0", "internal", "d");
    assert_eq!(check("CheckWithAdminVM", "work").as_deref(), Some("d"));
    assert_eq!(check("CheckWithTemplateAndAdminVM", "work").as_deref(), Some(""));
    assert_eq!(check("CheckWithNetvm", "work"), None);
    qubes.set("whonix-ws-dvm", "provides_network", "True");
    qubes.set("work", "netvm", "whonix-ws-dvm");
    qubes.ok("admin.vm.feature.Set", "whonix-ws-dvm", "internal", "n");
    assert_eq!(check("CheckWithNetvm", "work").as_deref(), Some("n"));
    qubes.ok("admin.vm.feature.Remove", "debian-dvm", "internal", "");
    assert!(qubes
        .refused("admin.vm.feature.Remove", "debian-dvm", "internal", "")
        .contains("FeatureNotFound"));
    for (name, value, why) in [
        ("x", "a\nb", "QubesValueError: x value contains illegal characters"),
        ("x@", "a", "QubesValueError: feature name contains illegal characters"),
        ("x", "\u{e9}", "hung up"),
    ] {
        assert_eq!(qubes.refused("admin.vm.feature.Set", "work", name, value), why);
    }
}

#[test]
fn preload_dispvm_max_is_the_number_of_spares_and_dom0s_holds_for_the_default() {
    let qubes = Qubes::new();
    let preload = |on: &str, number: &str| qubes.ok("admin.vm.feature.Set", on, "preload-dispvm-max", number);
    preload("debian-dvm", "2");
    assert_eq!(qubes.dvm("debian-dvm").spares, Some(2));
    qubes.ok("admin.property.Set", "dom0", "default_dispvm", "debian-dvm");
    assert_eq!(qubes.dvm("debian-dvm").spares, Some(2));
    preload("dom0", "3");
    assert_eq!(qubes.dvm("debian-dvm").spares, Some(3));
    qubes.ok("admin.property.Set", "dom0", "default_dispvm", "whonix-ws-dvm");
    assert_eq!((qubes.dvm("debian-dvm").spares, qubes.dvm("whonix-ws-dvm").spares), (Some(2), Some(3)));
    qubes.ok("admin.vm.feature.Remove", "dom0", "preload-dispvm-max", "");
    assert_eq!(qubes.dvm("whonix-ws-dvm").spares, None);
    let refused = qubes.refused("admin.vm.feature.Set", "debian-dvm", "preload-dispvm-max", "-1");
    assert!(refused.starts_with("QubesValueError"), "{refused}");
    assert_eq!(qubes.dvm("debian-dvm").spares, Some(2));
}

#[test]
fn properties_that_the_engine_reads_are_written_through_and_wrong_ones_refused() {
    let qubes = Qubes::new();
    qubes.set("work", "memory", "2048");
    qubes.set("work", "vcpus", "4");
    qubes.set("work", "label", "green");
    assert_eq!((qubes.dvm("work").memory_mib, qubes.dvm("work").vcpus), (2048, 4));
    assert_eq!(qubes.get("work", "memory"), set("2048"));
    qubes.ok("admin.vm.property.Reset", "work", "memory", "");
    assert_eq!((qubes.get("work", "memory"), qubes.dvm("work").memory_mib), (default("1024"), 1024));
    assert_eq!(qubes.get("work", "label"), set("green"));
    template(&qubes.state, "fedora-40");
    qubes.set("work", "template", "fedora-40");
    assert_eq!(qubes.dvm("work").template, "fedora-40");
    for (property, value, class) in [
        ("memory", "0", "QubesPropertyValueError"),
        ("memory", "+5", "QubesPropertyValueError"),
        ("vcpus", "99999999999999999999", "QubesPropertyValueError"),
        ("label", "pink", "QubesLabelNotFoundError"),
        ("template", "debian-dvm", "QubesPropertyValueError"),
        ("template", "../x", "QubesVMNotFoundError"),
        ("netvm", "debian-12", "QubesPropertyValueError"),
        ("debug", "maybe", "QubesPropertyValueError"),
        ("klass", "AdminVM", "QubesPropertyValueError"),
        ("kernel", "6.1", "QubesPropertyValueError"),
        ("default_user", "a\nb", "QubesPropertyValueError"),
        ("colour", "red", "QubesNoSuchPropertyError"),
    ] {
        let refused = qubes.refused("admin.vm.property.Set", "work", property, value);
        assert!(refused.starts_with(class), "{property}: {refused}");
    }
    let all = qubes.ok("admin.vm.property.GetAll", "work", "", "");
    let names: Vec<String> =
        Property::decode_lines(all.as_bytes()).unwrap().into_iter().map(|(name, _)| name).collect();
    assert_eq!(qubes.ok("admin.vm.property.List", "work", "", "").lines().collect::<Vec<_>>(), names);
    assert!(names.is_sorted());
    assert!(!qubes.ok("admin.vm.property.Help", "work", "netvm", "").is_empty());
}

#[test]
fn a_record_that_cannot_be_written_stays_as_it_was() {
    let qubes = Qubes::new();
    qubes.set("work", "memory", "2048");
    let (record, settings) = ("qube.toml", "settings.toml");
    for blocked in [record, settings] {
        // Where a record is written aside, a folder stands: as good as a full disk, and even root is refused.
        let aside = qubes.state.qube("work").join(format!(".{blocked}.{}.tmp", std::process::id()));
        fs::create_dir(&aside).unwrap();
        let before = [record, settings].map(|name| fs::read(qubes.state.qube("work").join(name)).unwrap());
        assert!(qubes
            .refused("admin.vm.property.Set", "work", "memory", "4096")
            .starts_with("QubesException"));
        let after = [record, settings].map(|name| fs::read(qubes.state.qube("work").join(name)).unwrap());
        assert_eq!(before, after, "{blocked}");
        fs::remove_dir(&aside).unwrap();
    }
    qubes.set("work", "memory", "4096");
    assert_eq!(qubes.dvm("work").memory_mib, 4096);
}

#[test]
fn qubes_are_made_and_removed_and_told_of() {
    let qubes = Qubes::new();
    let mut told = events(&qubes.socket(), "dom0").unwrap();
    told.set_limit(Some(Duration::from_secs(10))).unwrap();
    let mut wait_for = |name: &str, detail: (&str, &str)| loop {
        let event = told.next().unwrap().unwrap();
        if event.name == name && event.get(detail.0) == Some(detail.1) {
            return event;
        }
    };
    assert_eq!(wait_of(&qubes, "connection-established"), "connection-established");
    qubes.ok("admin.vm.Create.AppVM", "dom0", "debian-12", "name=new label=green");
    wait_for("domain-add", ("vm", "new"));
    assert_eq!(qubes.ok("admin.vm.tag.List", "new", "", ""), "created-by-dom0\n");
    assert_eq!((qubes.get("new", "memory"), qubes.get("new", "label")), (default("1024"), set("green")));
    qubes.set("new", "debug", "yes");
    assert_eq!(wait_for("property-set:debug", ("newvalue", "True")).subject, "new");
    qubes.ok("admin.vm.feature.Set", "new", "f", "v");
    wait_for("domain-feature-set:f", ("value", "v"));
    qubes.set("work", "management_dispvm", "debian-dvm");
    assert!(qubes.refused("admin.vm.Remove", "debian-dvm", "", "").contains("management_dispvm of work"));
    assert!(qubes.refused("admin.vm.Remove", "debian-12", "", "").contains("template of new"));
    let lease = qubes.disposable("debian-dvm");
    wait_for("domain-add", ("vm", &lease.number().to_string()));
    drop(lease);
    qubes.ok("admin.vm.Remove", "new", "", "");
    wait_for("domain-delete", ("vm", "new"));
    for (template, payload, why) in [
        ("debian-12", "name=work label=red", "AlreadyExists"),
        ("debian-12", "name=disp12 label=red", "AlreadyExists"),
        ("debian-12", "name=1x label=red", "QubesValueError"),
        ("debian-12", "name=x label=pink", "LabelNotFound"),
        ("work", "name=x label=red", "QubesValueError"),
        ("", "name=x label=red", "QubesNoTemplateError"),
        ("", "name=work label=red", "AlreadyExists"),
        ("gone", "name=x label=red", "QubesVMNotFoundError: No such domain: 'gone'"),
        ("gone", "name=work label=red", "QubesVMNotFoundError: No such domain: 'gone'"),
        ("debian-12", "name=x", "hung up"),
        ("debian-12", "name=x name=y label=red", "hung up"),
        ("debian-12", "name=x label=red pool=p", "hung up"),
    ] {
        let refused = qubes.refused("admin.vm.Create.AppVM", "dom0", template, payload);
        assert!(refused.contains(why), "{payload}: {refused}");
    }
}

/// What `qvm-create -P` and `-p` of Qubes' own tools ask for.
#[test]
fn a_qube_is_made_in_the_pool_there_is_and_in_no_other() {
    let qubes = Qubes::new();
    let create = "admin.vm.CreateInPool.AppVM";
    qubes.ok(create, "dom0", "debian-12", "name=one label=red pool=dispvm");
    qubes.ok(create, "dom0", "debian-12", "name=two label=red pool:private=dispvm pool:volatile=dispvm");
    qubes.ok("admin.vm.CreateInPool.DispVM", "dom0", "debian-dvm", "name=three label=red pool=dispvm");
    let all = qubes.ok("admin.vm.List", "dom0", "", "");
    assert!(all.contains("one class=AppVM") && all.contains("two ") && all.contains("three class=DispVM"));
    for pools in ["pool=lvm", "pool:private=lvm", "pool:kernel=dispvm", "pool:none=dispvm", "pool:=dispvm"] {
        let payload = format!("name=four label=red {pools}");
        assert_eq!(qubes.refused(create, "dom0", "debian-12", &payload), "hung up", "{pools}");
    }
    for class in ["TemplateVM", "StandaloneVM"] {
        for (verb, pool) in [("Create", ""), ("CreateInPool", " pool=dispvm")] {
            let (method, payload) =
                (format!("admin.vm.{verb}.{class}"), format!("name=five label=red{pool}"));
            let refused = qubes.refused(&method, "dom0", "", &payload);
            assert!(refused.starts_with("QubesNotImplementedError: "), "{method}: {refused}");
        }
    }
    assert!(qubes.refused("admin.vm.Console", "work", "", "").starts_with("QubesNotImplementedError: "));
}

#[test]
fn what_is_off_is_neither_put_to_sleep_nor_woken() {
    let qubes = Qubes::new();
    assert!(qubes.refused("admin.vm.Suspend", "work", "", "").starts_with("QubesVMNotRunningError"));
    assert!(qubes.refused("admin.vm.Resume", "work", "", "").starts_with("QubesVMNotPausedError"));
}

/// An AppVM `name` on a template `real`, with files.
fn with_files(qubes: &Qubes, name: &str) {
    let image = qubes.folder.path().join("image");
    fs::write(&image, [1; 4096]).unwrap();
    let files = control_plane::templates::TemplateFiles {
        root: &image,
        kernel: &image,
        initrd: &image,
        cmdline: String::new(),
    };
    control_plane::templates::add_template(&qubes.state, "real", "black", &files).unwrap();
    qubes.ok("admin.vm.Create.AppVM", "dom0", "real", &format!("name={name} label=red"));
}

#[test]
fn only_dom0_hears_where_its_files_are() {
    let qubes = Qubes::new();
    with_files(&qubes, "one");
    let private = qubes.state.qube("one").join("private");
    fs::rename(&private, private.with_file_name("aside")).unwrap();
    let import = |caller: &str| {
        let reply = control_plane::admin::import_volume(
            &qubes.state,
            caller,
            "one",
            "private",
            &mut "hello".as_bytes(),
            false,
        );
        let Some(admin_api::Reply::Exception(exception)) = reply else { panic!("{reply:?}") };
        exception.message()
    };
    let resize = |caller: &str| {
        let mut request =
            Request::new("admin.vm.volume.Resize", "one").argument("private").payload("3221225472");
        request.source = caller.to_owned();
        match call_within(&qubes.socket(), &request, Duration::from_secs(10)) {
            Err(ApiError::Exception(exception)) => exception.message(),
            other => panic!("{other:?}"),
        }
    };
    let root = qubes.state.root().display().to_string();
    for refused in [&import as &dyn Fn(&str) -> String, &resize] {
        let (whole, told) = (refused("dom0"), refused("work"));
        assert!(whole.contains(&root), "{whole}");
        assert!(!told.contains('/') && told.contains("(a file)"), "{told}");
        assert!(told.contains("No such file"), "it says why: {told}");
    }
}

#[test]
fn a_private_volume_grows_is_cloned_and_reverted_and_others_say_why_not() {
    let qubes = Qubes::new();
    for name in ["one", "two"] {
        with_files(&qubes, name);
    }
    let info = |name: &str, what: &str| {
        let info = qubes.ok("admin.vm.volume.Info", name, "private", "");
        info.lines().find_map(|line| line.strip_prefix(&format!("{what}=")).map(str::to_owned)).unwrap()
    };
    let data = |name: &str| {
        let mut start = [0; 6];
        fs::File::open(info(name, "path")).unwrap().read_exact(&mut start).unwrap();
        start
    };
    let import = |text: &str, with_size: bool| {
        let mut text = text.as_bytes();
        control_plane::admin::import_volume(&qubes.state, "dom0", "one", "private", &mut text, with_size)
    };
    assert!(matches!(import("hello", false), Some(admin_api::Reply::Ok(_))));
    assert_eq!(data("one"), *b"hello\0");
    assert!(
        matches!(import("100000000\nhello", true), Some(admin_api::Reply::Exception(_))),
        "it is cut short"
    );
    assert!(import("much\nhello", true).is_none());
    qubes.ok("admin.vm.volume.Resize", "one", "private", "3221225472");
    assert_eq!((info("one", "size"), data("one")), ("3221225472".to_owned(), *b"hello\0"));
    for (volume, size, why) in [
        ("private", "2147483648", "StoragePoolException: the private volume of one has 3072 MiB"),
        ("root", "9999999999", "StoragePoolException: one:root cannot be changed: it is its template's"),
        ("kernel", "9999999999", "StoragePoolException: one:kernel cannot be changed"),
        ("private", "-1", "hung up"),
        ("private", "1e9", "hung up"),
        ("private", "999999999999999999999", "hung up"),
        ("private", "9999999999999999999", "StoragePoolException: a volume of"),
    ] {
        let refused = qubes.refused("admin.vm.volume.Resize", "one", volume, size);
        assert!(refused.starts_with(why), "{volume} {size}: {refused}");
    }
    qubes.ok("admin.vm.volume.Resize", "one", "volatile", "2147483648");
    assert_eq!(qubes.dvm("one").volatile_mib, 2048);
    let token = qubes.ok("admin.vm.volume.CloneFrom", "one", "private", "");
    qubes.ok("admin.vm.volume.CloneTo", "two", "private", &token);
    assert_eq!((info("two", "size"), data("two")), ("3221225472".to_owned(), *b"hello\0"));
    assert_eq!(qubes.refused("admin.vm.volume.CloneTo", "two", "private", &token), "hung up");
    let of_root = qubes.ok("admin.vm.volume.CloneFrom", "one", "root", "");
    let refused = qubes.refused("admin.vm.volume.CloneTo", "two", "private", &of_root);
    assert!(refused.starts_with("StoragePoolException"), "{refused}");
    // The others have no files.
    for name in ["debian-dvm", "whonix-ws-dvm", "work", "debian-12"] {
        for folder in ["private", "root"] {
            fs::create_dir(qubes.state.qube(name).join(folder)).unwrap();
        }
    }
    // Of what was before, one stays, and more where that is wanted.
    assert_eq!(qubes.ok("admin.vm.volume.ListSnapshots", "one", "private", ""), "1\n2\n");
    control_plane::savefiles::collect(&qubes.state).unwrap();
    assert_eq!(qubes.ok("admin.vm.volume.ListSnapshots", "one", "private", ""), "2\n");
    assert_eq!(qubes.refused("admin.vm.volume.Revert", "one", "private", "3"), "hung up");
    qubes.ok("admin.vm.volume.Revert", "one", "private", "2");
    assert_eq!((info("one", "size"), data("one")), ("2147483648".to_owned(), *b"hello\0"));
    qubes.ok("admin.vm.volume.Clear", "two", "private", "");
    assert_eq!((info("two", "size"), data("two")), ("3221225472".to_owned(), [0; 6]));
    assert!(qubes.refused("admin.vm.volume.Clear", "two", "root", "").starts_with("StoragePoolException"));
    qubes.ok("admin.vm.volume.Set.revisions_to_keep", "one", "private", "0");
    control_plane::savefiles::collect(&qubes.state).unwrap();
    assert_eq!(qubes.ok("admin.vm.volume.ListSnapshots", "one", "private", ""), "");
}

/// There is no hypervisor here, so none of them starts: who was tried, in which order, is told.
#[test]
fn a_netvm_is_started_first_and_why_it_is_not_is_why_the_qube_is_not() {
    let qubes = Qubes::new();
    for name in ["net", "firewall"] {
        app(&qubes.state, name, "red", false);
        qubes.set(name, "provides_network", "True");
    }
    qubes.set("firewall", "netvm", "net");
    qubes.set("work", "netvm", "firewall");
    let mut heard = events(&qubes.socket(), "dom0").unwrap();
    let mut next = || loop {
        let event = heard.next().unwrap().unwrap();
        if event.name.contains("start") {
            return format!("{} {}", event.name, event.subject);
        }
    };
    let told = std::thread::scope(|scope| {
        let told = scope.spawn(move || (0..6).map(|_| next()).collect::<Vec<_>>());
        std::thread::sleep(Duration::from_millis(200));
        let refused = qubes.refused("admin.vm.Start", "work", "", "");
        assert!(
            refused.contains("netvm of work does not start: the netvm of firewall does not start"),
            "{refused}"
        );
        told.join().unwrap()
    });
    let expected = ["pre-start work", "pre-start firewall", "pre-start net"].into_iter().chain([
        "start-failed net",
        "start-failed firewall",
        "start-failed work",
    ]);
    let told: Vec<&str> = told.iter().map(|event| event.trim_start_matches("domain-")).collect();
    assert_eq!(told, expected.collect::<Vec<_>>());
    let refused = qubes.refused("admin.vm.property.Set", "net", "netvm", "work");
    assert!(refused.contains("does not provide network"), "{refused}");
    // By hand, what the API refuses.
    let path = qubes.state.qube("net").join("settings.toml");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("[properties]", "[properties]\nnetvm = \"firewall\"")).unwrap();
    assert!(qubes.refused("admin.vm.Start", "work", "", "").contains("loops in network are unsupported"));
    fs::remove_dir_all(qubes.state.qube("net")).unwrap();
    assert!(qubes.refused("admin.vm.Start", "work", "", "").contains("netvm of firewall is not there: net"));
}

/// On the first answer Qubes' own client goes on to run dom0's service itself.
#[test]
fn dom0_is_on_and_stays_so() {
    let qubes = Qubes::new();
    assert!(qubes.refused("admin.vm.Start", "dom0", "", "").starts_with("QubesVMNotHaltedError"));
    for method in ["Kill", "Shutdown", "Pause", "Suspend"] {
        let refused = qubes.refused(&format!("admin.vm.{method}"), "dom0", "", "");
        assert!(refused.starts_with("QubesVMError: Cannot "), "{method}: {refused}");
    }
    assert!(qubes.refused("admin.vm.Unpause", "dom0", "", "").starts_with("QubesVMNotPausedError"));
}

#[test]
fn t1_t7_f7_a_named_disposable_begins_as_its_template_is_and_keeps_its_record() {
    let qubes = Qubes::new();
    qubes.set("work", "provides_network", "1");
    qubes.set("whonix-ws-dvm", "netvm", "work");
    qubes.set("whonix-ws-dvm", "default_dispvm", "debian-dvm");
    qubes.ok("admin.vm.feature.Set", "whonix-ws-dvm", "gui", "1");
    qubes.ok("admin.vm.feature.Set", "whonix-ws-dvm", "preload-dispvm-max", "1");
    qubes.ok("admin.vm.firewall.Set", "whonix-ws-dvm", "", "action=drop\n");
    qubes.ok("admin.vm.Create.DispVM", "dom0", "whonix-ws-dvm", "name=sys-usb label=orange");
    let list = qubes.ok("admin.vm.List", "sys-usb", "", "");
    assert!(list.starts_with("sys-usb class=DispVM state=Halted "), "{list}");
    assert_eq!(qubes.get("sys-usb", "template"), set("whonix-ws-dvm"));
    assert_eq!(qubes.get("sys-usb", "label"), set("orange"));
    assert_eq!(qubes.get("sys-usb", "auto_cleanup"), default("False"));
    assert_eq!(qubes.get("sys-usb", "include_in_backups"), default("True"));
    // The stock clone sets whatever is not the default, and goes on where it is hung up on.
    assert_eq!(qubes.refused("admin.vm.property.Set", "sys-usb", "dispid", "77"), "hung up");
    assert_eq!(qubes.get("sys-usb", "netvm"), set("work"));
    assert_eq!(qubes.get("sys-usb", "default_dispvm"), set("debian-dvm"));
    assert_eq!(qubes.ok("admin.vm.feature.List", "sys-usb", "", ""), "gui\n");
    assert_eq!(qubes.ok("admin.vm.tag.List", "sys-usb", "", ""), "created-by-dom0\n");
    // What its template becomes is no matter to it any more.
    qubes.ok("admin.vm.property.Reset", "whonix-ws-dvm", "netvm", "");
    qubes.ok("admin.vm.firewall.Set", "whonix-ws-dvm", "", "action=accept\n");
    qubes.set("whonix-ws-dvm", "label", "blue");
    assert_eq!(qubes.get("sys-usb", "netvm"), set("work"));
    assert_eq!(qubes.ok("admin.vm.firewall.Get", "sys-usb", "", ""), "action=drop\n");
    qubes.set("sys-usb", "auto_cleanup", "True");
    assert_eq!(qubes.get("sys-usb", "auto_cleanup"), set("True"));
    qubes.set("sys-usb", "auto_cleanup", "False");
    // L8: it may be made from another, while it does not run.
    qubes.set("sys-usb", "template", "debian-dvm");
    assert!(qubes.refused("admin.vm.property.Set", "sys-usb", "template", "work").contains("PropertyValue"));
    qubes.ok("admin.vm.Remove", "sys-usb", "", "");
    assert!(!qubes.state.qube("sys-usb").exists());
}

#[test]
fn t3_a_template_for_disposables_stays_one_while_a_disposable_names_it() {
    let qubes = Qubes::new();
    qubes.ok("admin.vm.Create.DispVM", "dom0", "debian-dvm", "name=mail-disp label=red");
    let off = || qubes.refused("admin.vm.property.Set", "debian-dvm", "template_for_dispvms", "False");
    assert!(off().starts_with("QubesVMInUseError") && off().contains("mail-disp"), "{}", off());
    assert!(qubes.refused("admin.vm.Remove", "debian-dvm", "", "").contains("template of mail-disp"));
    let refused =
        |template: &str, payload: &str| qubes.refused("admin.vm.Create.DispVM", "dom0", template, payload);
    assert!(
        refused("work", "name=x label=red").starts_with("QubesValueError: template for disposable (work)")
    );
    assert!(refused("debian-12", "name=x label=red").starts_with("QubesValueError"));
    assert!(refused("debian-dvm", "name=mail-disp label=red").contains("AlreadyExists"));
    assert!(refused("debian-dvm", "name=disp7 label=red").contains("AlreadyExists"));
    assert!(refused("", "name=x label=red").contains("NoTemplate"));
    assert_eq!(refused("gone", "name=x label=red"), "QubesVMNotFoundError: No such domain: 'gone'");
    qubes.ok("admin.vm.Remove", "mail-disp", "", "");
    qubes.set("debian-dvm", "template_for_dispvms", "False");
}

#[test]
fn t4_t5_t6_l3_a_disposable_made_by_the_api_is_of_the_callers_default_and_not_another_ones_name() {
    let qubes = Qubes::new();
    let make = |on: &str, payload: &str| qubes.ok("admin.vm.CreateDisposable", on, "", payload);
    assert!(qubes
        .refused("admin.vm.CreateDisposable", "dom0", "", "")
        .starts_with("QubesException: Refusing to create disposable"));
    qubes.ok("admin.property.Set", "dom0", "default_dispvm", "whonix-ws-dvm");
    let name = make("dom0", "");
    assert!(control_plane::clones::number_of(&name).is_some(), "{name}");
    assert_eq!(qubes.get(&name, "template"), set("whonix-ws-dvm"));
    assert_eq!(qubes.get(&name, "label"), set("purple"));
    assert_eq!(qubes.get(&name, "auto_cleanup"), set("True"));
    assert_eq!(qubes.get(&name, "dispid"), set(name.strip_prefix("disp").unwrap()));
    assert_eq!(qubes.ok("admin.vm.tag.List", &name, "", ""), "created-by-dom0\ndisp-created-by-dom0\n");
    // An anonymous caller's is anonymous.
    app(&qubes.state, "anon-whonix", "red", false);
    qubes.ok("admin.property.Set", "dom0", "default_dispvm", "debian-dvm");
    qubes.set("anon-whonix", "default_dispvm", "whonix-ws-dvm");
    let request =
        Request { source: "anon-whonix".into(), ..Request::new("admin.vm.CreateDisposable", "dom0") };
    let answer = call_within(&qubes.socket(), &request.payload("uuid"), Duration::from_secs(10)).unwrap();
    let by_uuid = String::from_utf8(answer).unwrap();
    assert!(by_uuid.starts_with("uuid:"), "{by_uuid}");
    assert_eq!(qubes.get(&by_uuid, "template"), set("whonix-ws-dvm"));
    assert!(qubes.ok("admin.vm.tag.List", &by_uuid, "", "").contains("disp-created-by-anon-whonix\n"));
    let refused = qubes.refused("admin.vm.CreateDisposable", "debian-dvm", "", "x");
    assert!(refused.starts_with("QubesValueError: Invalid payload"), "{refused}");
    assert!(qubes
        .refused("admin.vm.CreateDisposable", "work", "", "")
        .contains("template_for_dispvms=False"));
    // The next daemon removes what nobody has started; named ones stay.
    qubes.ok("admin.vm.Create.DispVM", "dom0", "debian-dvm", "name=mail-disp label=red");
    let left = qubes.ok("admin.vm.CreateDisposable", "debian-dvm", "", "");
    let held = qubes.ok("admin.vm.CreateDisposable", "debian-dvm", "", "");
    let starting = control_plane::qube::hold_running(&qubes.state, &held).unwrap();
    drop(serve(&qubes.state, &qubes.folder.path().join("next.sock")).unwrap());
    let there = |name: &str| qubes.state.qube(name).exists();
    assert!(there("mail-disp") && there(&held) && !there(&left));
    drop(starting);
    let name = qubes.ok("admin.vm.CreateDisposable", "debian-dvm", "", "");
    // A name that a record has is nobody else's, and a record is not swept away before it has run.
    let number = control_plane::clones::number_of(&name).unwrap();
    assert!(control_plane::clones::is_taken(&qubes.state, number));
    control_plane::clones::sweep(&qubes.state).unwrap();
    qubes.ok("admin.vm.Remove", &name, "", "");
    assert!(!control_plane::clones::is_taken(&qubes.state, number));
}

/// The first event of a connection of its own.
fn wait_of(qubes: &Qubes, name: &str) -> String {
    let event = events(&qubes.socket(), "dom0").unwrap().next().unwrap().unwrap();
    assert_eq!(event.name, name);
    event.name
}

/// A keeper that holds its clone's record as long as it lives.
fn keeper(state: &State, name: &str) -> Child {
    let path = state.clones().join(name);
    fs::write(&path, "").unwrap();
    let mut child = Command::new("flock")
        .args(["--no-fork", "-x"])
        .arg(&path)
        .args(["sleep", "60"])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let record = serde_json::json!({"name": name, "dvm": "debian-dvm", "root_hash": "x", "template": ["debian-12", 1],
        "pid": child.id(), "keeping": "launcher", "started": 1});
    fs::write(&path, record.to_string()).unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    while control_plane::clones::list(state).unwrap().is_empty() {
        assert!(Instant::now() < deadline && child.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(5));
    }
    child
}

#[test]
fn l5_kill_ends_who_keeps_the_disposable() {
    let qubes = Qubes::new();
    let mut keeper = keeper(&qubes.state, "disp42");
    assert!(qubes.ok("admin.vm.List", "disp42", "", "").starts_with("disp42 class=DispVM state=Running"));
    qubes.ok("admin.vm.Kill", "disp42", "", "");
    assert!(!keeper.wait().unwrap().success());
    assert!(qubes.refused("admin.vm.Kill", "disp42", "", "").contains("VMNotFound"));
    assert!(qubes.refused("admin.vm.Kill", "work", "", "").contains("VMNotStarted"));
}

#[test]
fn labels_tags_notes_volumes_and_pools() {
    let qubes = Qubes::new();
    assert_eq!(qubes.ok("admin.label.List", "dom0", "", "").lines().count(), 8);
    assert_eq!(qubes.ok("admin.label.Get", "dom0", "red", ""), "0xcc0000");
    assert_eq!(qubes.ok("admin.label.Index", "dom0", "black", ""), "8");
    qubes.ok("admin.vm.tag.Set", "work", "mail", "");
    assert_eq!(qubes.ok("admin.vm.tag.Get", "work", "mail", ""), "1");
    qubes.ok("admin.vm.tag.Remove", "work", "mail", "");
    assert!(qubes.refused("admin.vm.tag.Remove", "work", "mail", "").contains("TagNotFound"));
    assert!(qubes.refused("admin.vm.tag.Set", "work", "a/b", "").contains("QubesValueError"));
    qubes.ok("admin.vm.notes.Set", "work", "", "one\ntwo");
    assert_eq!(qubes.ok("admin.vm.notes.Get", "work", "", ""), "one\ntwo");
    assert_eq!(qubes.ok("admin.vm.volume.List", "work", "", ""), "root\nprivate\nvolatile\nkernel\n");
    let info = qubes.ok("admin.vm.volume.Info", "work", "private", "");
    assert!(info.contains("size=2147483648\n") && info.contains("save_on_stop=True\n"), "{info}");
    let root = qubes.ok("admin.vm.volume.Info", "work", "root", "");
    assert!(root.contains("snap_on_start=True\n") && root.contains("source=debian-12/root\n"), "{root}");
    qubes.ok("admin.vm.volume.Set.revisions_to_keep", "work", "private", "4");
    assert!(qubes.ok("admin.vm.volume.Info", "work", "private", "").contains("revisions_to_keep=4\n"));
    assert_eq!(qubes.refused("admin.vm.volume.Info", "work", "../x", ""), "hung up");
    let pool =
        qubes.ok("admin.pool.Info", "dom0", qubes.ok("admin.pool.List", "dom0", "", "").trim_end(), "");
    for line in ["driver=file", "ephemeral_volatile=True", "revisions_to_keep=1"] {
        assert!(pool.lines().any(|other| other == line), "{pool}");
    }
    let usage = qubes.ok("admin.pool.UsageDetails", "dom0", "dispvm", "");
    assert!(usage.starts_with("data_size=") && usage.contains("\ndata_usage="), "{usage}");
    let all = qubes.ok("admin.pool.volume.List", "dom0", "dispvm", "");
    assert!(all.lines().any(|vid| vid == "work/private") && all.lines().count() == 16, "{all}");
    let named = |method: &str, vid: &str| qubes.send(method, "dom0", "dispvm", vid).ok();
    assert_eq!(named("admin.pool.volume.Info", "work/root"), Some(root));
    assert_eq!(named("admin.pool.volume.ListSnapshots", "work/root"), Some(String::new()));
    for vid in ["work/none", "none/root", "work", "dom0/root", "../x"] {
        assert_eq!(named("admin.pool.volume.Info", vid), None, "{vid}");
    }
    assert_eq!(qubes.refused("admin.pool.volume.List", "dom0", "lvm", ""), "hung up");
    assert!(qubes
        .refused("admin.vm.firewall.Set", "work", "", "action=reject\n")
        .starts_with("QubesValueError"));
}

#[test]
fn a_volume_may_be_said_to_be_what_it_is() {
    let qubes = Qubes::new();
    let set = |flag: &str| format!("admin.vm.volume.Set.{flag}");
    for (flag, volume, is) in [
        ("rw", "private", true),
        ("rw", "kernel", false),
        ("ephemeral", "private", false),
        ("ephemeral", "volatile", true),
    ] {
        let other = if is { "False" } else { "True" };
        qubes.ok(&set(flag), "work", volume, if is { "True" } else { "False" });
        assert_eq!(
            qubes.refused(&set(flag), "work", volume, other),
            format!(
                "StoragePoolException: work:{volume} has {flag}={}, which cannot be changed",
                if is { "True" } else { "False" }
            )
        );
        assert_eq!(qubes.refused(&set(flag), "work", volume, "maybe"), "hung up");
    }
    assert_eq!(qubes.refused(&set("rw"), "work", "none", "True"), "hung up");
}

/// As the stock client asks since R4.3, of a class that it was not told of too.
#[test]
fn there_are_no_devices_of_any_class() {
    let qubes = Qubes::new();
    for class in ["block", "mic", "pci", "usb"] {
        for what in ["Available", "Assigned", "Attached"] {
            for on in ["work", "dom0"] {
                assert_eq!(qubes.ok(&format!("admin.vm.device.{class}.{what}"), on, "", ""), "");
            }
        }
    }
    assert_eq!(qubes.refused("admin.vm.device.block.Attach", "work", "dom0+sda", ""), "hung up");
}

/// Scripts look for core-admin's words, whose names stand in single quotes.
#[test]
fn names_in_messages_are_quoted_as_core_admin_quotes_them() {
    let qubes = Qubes::new();
    for (method, on, argument, why) in [
        ("admin.vm.Start", "none", "", "QubesVMNotFoundError: No such domain: 'none'"),
        ("admin.vm.Kill", "work", "", "QubesVMNotStartedError: Domain is powered off: 'work'"),
        ("admin.vm.Unpause", "work", "", "QubesVMNotPausedError: Domain is not paused: 'work'"),
        (
            "admin.vm.Pause",
            "work",
            "",
            "QubesVMNotRunningError: Domain not running (either powered off or paused): 'work'",
        ),
        ("admin.vm.property.Get", "work", "no", "QubesNoSuchPropertyError: Invalid property 'no' of work"),
        ("admin.label.Get", "dom0", "pink", "QubesValueError: Label does not exist: pink"),
    ] {
        assert_eq!(qubes.refused(method, on, argument, ""), why);
    }
}

#[test]
fn calls_that_are_none_are_hung_up_on() {
    let qubes = Qubes::new();
    for (method, on, argument, payload) in [
        ("admin.vm.Nothing", "work", "", ""),
        ("admin.vm.property.Nothing", "work", "x", ""),
        ("admin.property.List", "work", "", ""),
        ("admin.vm.List", "dom0", "x", ""),
        ("admin.vm.List", "dom0", "", "x"),
        ("admin.vm.property.Get", "work", "", ""),
        ("admin.vm.Remove", "dom0", "", ""),
    ] {
        assert_eq!(qubes.refused(method, on, argument, payload), "hung up", "{method}");
    }
    for bytes in [&b"nonsense"[..], b"", &[b'x'; 70_000], b"admin.vm.List+ nobody name dom0\0"] {
        let mut stream = UnixStream::connect(qubes.socket()).unwrap();
        let _ = stream.write_all(bytes).and_then(|()| stream.shutdown(Shutdown::Write));
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(!answer.starts_with(b"0"), "{answer:?}");
    }
}

#[test]
fn many_that_say_nothing_or_half_of_it_keep_nobody_from_being_heard() {
    let qubes = Qubes::new();
    let silent: Vec<UnixStream> = (0..400)
        .map(|number| {
            let mut stream = UnixStream::connect(qubes.socket()).unwrap();
            if number % 2 == 0 {
                let _ = stream.write_all(b"admin.vm.List+ dom0 na");
            }
            stream
        })
        .collect();
    let start = Instant::now();
    for _ in 0..20 {
        qubes.ok("admin.vm.List", "dom0", "", "");
    }
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    // The first of them were hung up on, for the sake of the last.
    let mut first = &silent[0];
    first.set_read_timeout(Some(Duration::from_secs(4))).unwrap();
    assert!(matches!(first.read(&mut [0]), Ok(0)));
}

#[test]
fn the_socket_has_its_mode_and_takes_the_place_of_a_dead_one_only() {
    let mut qubes = Qubes::new();
    assert_eq!(fs::metadata(qubes.socket()).unwrap().permissions().mode() & 0o777, 0o660);
    let refused = serve(&qubes.state, &qubes.socket()).unwrap_err();
    assert!(refused.to_string().contains("already"), "{refused}");
    let file = qubes.folder.path().join("file");
    fs::write(&file, "x").unwrap();
    assert!(serve(&qubes.state, &file).is_err());
    assert_eq!(fs::read(&file).unwrap(), b"x");
    let dead = qubes.folder.path().join("dead.sock");
    drop(UnixListener::bind(&dead).unwrap());
    let before = fs::metadata(&dead).unwrap().ino();
    let served = serve(&qubes.state, &dead).unwrap();
    assert_ne!(fs::metadata(&dead).unwrap().ino(), before);
    drop((served, qubes.served.take()));
    assert!(!Path::exists(&dead) && !qubes.socket().exists());
}

/// The mark is 2 ms; it is printed, and only an order of magnitude is held to.
#[test]
fn get_all_with_two_hundred_qubes_is_quick() {
    let qubes = Qubes::new();
    for number in 0..200 {
        app(&qubes.state, &format!("app-{number}"), "red", false);
    }
    qubes.ok("admin.property.Set", "dom0", "default_dispvm", "debian-dvm");
    let mut times: Vec<Duration> = (0..50)
        .map(|number| {
            let start = Instant::now();
            qubes.ok("admin.vm.property.GetAll", &format!("app-{number}"), "", "");
            start.elapsed()
        })
        .collect();
    times.sort();
    let start = Instant::now();
    assert_eq!(qubes.ok("admin.vm.List", "dom0", "", "").lines().count(), 205);
    println!("GetAll: median {:?}, most {:?}; List: {:?}", times[25], times[49], start.elapsed());
    assert!(times[25] < Duration::from_millis(20), "{:?}", times[25]);
}

/// The program itself, linked as it is installed: it serves the socket beside what it did before, and takes it away at its end.
#[test]
fn dispvmd_serves_the_api_until_it_is_told_to_end() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("qubesd.sock");
    let mut daemon = Command::new(env!("CARGO_BIN_EXE_dispvmd"))
        .arg("--root")
        .arg(folder.path().join("state"))
        .arg("--api-socket")
        .arg(&socket)
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    let list = loop {
        match call_within(&socket, &Request::new("admin.vm.List", "dom0"), Duration::from_secs(5)) {
            Ok(list) => break list,
            Err(error) => {
                assert!(daemon.try_wait().unwrap().is_none() && Instant::now() < deadline, "{error}")
            }
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    assert!(list.starts_with(b"dom0 class=AdminVM state=Running "));
    let pid = nix::unistd::Pid::from_raw(daemon.id() as i32);
    // Its own threads must not be what the signal ends.
    std::thread::sleep(Duration::from_millis(200));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(daemon.wait().unwrap().success());
    assert!(!socket.exists());
}

/// As systemd starts it: with a socket that is there already, at which callers may wait, and stays when the daemon goes.
#[test]
fn dispvmd_takes_the_socket_that_it_is_handed_and_says_when_it_is_ready() {
    let folder = tempfile::tempdir().unwrap();
    let (socket, notify) = (folder.path().join("qubesd.sock"), folder.path().join("notify"));
    let listener = UnixListener::bind(&socket).unwrap();
    let ready = UnixDatagram::bind(&notify).unwrap();
    ready.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let start = || {
        Command::new("sh")
            .args(["-c", "exec 3<&0 </dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec \"$@\"", "sh"])
            .args([env!("CARGO_BIN_EXE_dispvmd"), "--root"])
            .arg(folder.path().join("state"))
            .env("NOTIFY_SOCKET", &notify)
            .stdin(std::os::fd::OwnedFd::from(listener.try_clone().unwrap()))
            .spawn()
            .unwrap()
    };
    for signal in [nix::sys::signal::Signal::SIGTERM, nix::sys::signal::Signal::SIGKILL] {
        let request = Request::new("admin.vm.List", "dom0");
        let waiting = {
            let (socket, request) = (socket.clone(), request.clone());
            std::thread::spawn(move || call_within(&socket, &request, Duration::from_secs(10)))
        };
        let mut daemon = start();
        assert!(waiting.join().unwrap().unwrap().starts_with(b"dom0 class=AdminVM state=Running "));
        let mut said = [0; 64];
        let count = ready.recv(&mut said).unwrap();
        assert_eq!(&said[..count], b"READY=1");
        // It has one descriptor of it, which no program it starts inherits.
        let pid = daemon.id();
        let is_it = |fd: i32| {
            fs::read_link(format!("/proc/{pid}/fd/{fd}"))
                .is_ok_and(|to| to.to_string_lossy().starts_with("socket:"))
        };
        let flags = |fd: i32| fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).unwrap_or_default();
        let inherited: Vec<i32> = (3..32)
            .filter(|fd| {
                is_it(*fd)
                    && !flags(*fd).lines().any(|line| line.starts_with("flags:") && line.contains("02"))
            })
            .collect();
        assert!(inherited.is_empty(), "{inherited:?}");
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), signal).unwrap();
        daemon.wait().unwrap();
        assert!(socket.exists());
    }
}

#[test]
fn dom0_is_dom0_by_its_uuid_too() {
    let qubes = Qubes::new();
    let dom0 = "uuid:00000000-0000-0000-0000-000000000000";
    for method in ["Kill", "Start", "Pause", "Remove", "Shutdown"] {
        let method = format!("admin.vm.{method}");
        let by_name = qubes.refused(&method, "dom0", "", "");
        assert_eq!(qubes.refused(&method, dom0, "", ""), by_name, "{method}");
    }
    assert!(qubes.ok("admin.label.List", dom0, "", "").contains("red"));
}

#[test]
fn no_qube_is_made_whose_name_cannot_call_or_is_a_word() {
    let qubes = Qubes::new();
    for name in
        ["a.b", "none", "default", "Domain-0", "work-dm", "1a", "-a", "a/b", "@dispvm", "uuid:x", "a\u{e9}"]
    {
        for (method, of) in [("AppVM", "debian-12"), ("DispVM", "debian-dvm")] {
            let payload = format!("name={name} label=red");
            let refused = qubes.refused(&format!("admin.vm.Create.{method}"), "dom0", of, &payload);
            assert!(
                refused.starts_with("QubesValueError: Illegal") || refused == "hung up",
                "{name}: {refused}"
            );
        }
    }
    for name in ["disp1", "dom0", "work"] {
        let payload = format!("name={name} label=red");
        let refused = qubes.refused("admin.vm.Create.DispVM", "dom0", "debian-dvm", &payload);
        assert!(refused.starts_with("QubesVMAlreadyExistsError"), "{name}: {refused}");
    }
}
