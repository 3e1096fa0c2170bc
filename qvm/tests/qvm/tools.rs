//! What the tools ask for, what they print, and how they end: byte for byte.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use nix::sys::signal::Signal;

use crate::server::{Ended, Server};

const LIST: (&str, &str) = (
    "admin.vm.List dom0",
    "work class=AppVM state=Running uuid=1-2\n\
     dom0 class=AdminVM state=Running uuid=0-0\n\
     debian-dvm class=AppVM state=Halted uuid=1-3\n\
     sys-net class=AppVM state=Paused uuid=1-4\n",
);
const WORK: (&str, &str) = (
    "admin.vm.property.GetAll work",
    "netvm default=False type=vm sys-net\n\
     template default=False type=vm debian-13\n\
     label default=False type=label blue\n\
     memory default=True type=int 400\n\
     maxmem default=True type=int \n\
     default_dispvm default=True type=vm \n\
     kernelopts default=True type=str a\\\\b\n\
     debug default=True type=bool False\n",
);
const OTHERS: [(&str, &str); 3] = [
    ("admin.vm.property.GetAll dom0", "label default=True type=label black\n"),
    ("admin.vm.property.GetAll debian-dvm", "template default=False type=vm debian-13\nlabel default=False type=label red\nnetvm default=True type=vm \n"),
    ("admin.vm.property.GetAll sys-net", "label default=False type=label red\nnetvm default=False type=vm \nprovides_network default=False type=bool True\n"),
];
const INTERNAL: [(&str, &str); 3] = [
    (
        "admin.vm.feature.Get+internal work",
        "!QubesFeatureNotFoundError Feature not set for domain work: internal",
    ),
    ("admin.vm.feature.Get+internal sys-net", ""),
    ("admin.vm.feature.Get+internal debian-dvm", "1"),
];

fn server(more: &[(&str, &str)]) -> Server {
    Server::new(&[&[LIST, WORK][..], &OTHERS, &INTERNAL, more].concat())
}

#[test]
fn t9_internal_qubes_are_hidden_unless_asked_for() {
    let server = server(&[]);
    server.run("qvm-ls").is(
        0,
        "NAME     STATE    CLASS    LABEL  TEMPLATE   NETVM\n\
         dom0     Running  AdminVM  black  -          -\n\
         sys-net  Paused   AppVM    red    -          -\n\
         work     Running  AppVM    blue   debian-13  sys-net\n",
    );
    server.run("qvm-ls --raw-list").is(0, "dom0\nsys-net\nwork\n");
    server.run("qvm-ls --raw-list --internal y").is(0, "debian-dvm\n");
    server.run("qvm-ls --raw-list --all --exclude dom0").is(0, "debian-dvm\nsys-net\nwork\n");
    server.run("qvm-ls --raw-data debian-dvm").is(0, "debian-dvm|Halted|AppVM|red|debian-13|-\n");
}

#[test]
fn ls_shows_qubes_by_what_they_are_set_to() {
    let none = "!QubesFeatureNotFoundError Feature not set";
    let server = server(&[
        ("admin.vm.feature.Get+servicevm dom0", none),
        ("admin.vm.feature.Get+servicevm work", none),
        ("admin.vm.feature.Get+servicevm sys-net", "1"),
        ("admin.vm.feature.Get+updates-available dom0", "1"),
        ("admin.vm.feature.Get+updates-available work", ""),
        ("admin.vm.feature.Get+updates-available sys-net", none),
    ]);
    for (filter, shown) in [
        ("--template-source debian-13 none", "work\n"),
        ("--netvm-is sys-net", "work\n"),
        ("--prefs label=red provides-network=True", "sys-net\n"),
        ("--prefs label=red netvm=None", "sys-net\n"),
        ("--prefs label=red memory=400", ""),
        ("--servicevm y", "sys-net\n"),
        ("--servicevm no", "dom0\nwork\n"),
        ("--pending-update", "dom0\n"),
        ("--features servicevm=1", "sys-net\n"),
        ("--features servicevm= updates-available=\"\"", "work\n"),
    ] {
        server.run(&format!("qvm-ls --raw-list {filter}")).is(0, shown);
    }
    server.run("qvm-ls --tree --raw-data -O name").is(0, "dom0\nsys-net\nwork\n");
    assert_eq!(server.run("qvm-ls --features =1").status, 2);
}

#[test]
fn ls_shows_what_is_asked_for() {
    let server = server(&[
        ("admin.vm.CurrentState work", "mem=409600 mem_static_max=409600 cputime=7 power_state=Running"),
        ("admin.vm.volume.List work", "root\nprivate\n"),
        ("admin.vm.volume.Info+root work", "pool=lvm\nsize=10737418240\nusage=1073741824\n"),
        ("admin.vm.volume.Info+private work", "pool=lvm\nsize=2147483648\nusage=104857600\n"),
        ("admin.vm.property.Get+gateway sys-net", "default=True type=str 10.137.0.5"),
        ("admin.vm.tag.List work", "created-by-dom0\nmine\n"),
        ("admin.vm.tag.List dom0", ""),
        ("admin.vm.tag.List sys-net", "created-by-dom0\n"),
    ]);
    server
        .run("qvm-ls --fields name,default_dispvm,memory,flags,uuid work")
        .is(0, "NAME  DEFAULT-DISPVM  MEMORY  FLAGS     UUID\nwork  -               400     ar------  1-2\n");
    server.run("qvm-ls -O name,flags --raw-data --paused").is(0, "sys-net|ap-N----\n");
    server.run("qvm-ls -o disk --raw-data work").is(0, "work|Running|1124|100|2048|4%|1024|10240|10%\n");
    server.run("qvm-ls -o network --raw-data work").is(0, "work|Running|sys-net|-|-|10.137.0.5\n");
    server.run("qvm-ls --running --raw-list").is(0, "dom0\nwork\n");
    server.run("qvm-ls --class AppVM --label red,green --raw-list").is(0, "sys-net\n");
    server.run("qvm-ls --raw-list --running --paused --tags mine").is(0, "work\n");
    server.run("qvm-ls --raw-list --running --paused --exclude-tags mine").is(0, "dom0\nsys-net\n");
    server.run("qvm-ls --raw-list *-*").is(0, "debian-dvm\nsys-net\n");
    server.run("qvm-ls --fields name,priv-pool,root-used --raw-data work").is(0, "work|lvm|10%\n");
    server.run("qvm-ls -n --raw-data work").is(0, "work|Running|sys-net|-|-|10.137.0.5\n");
    server.run("qvm-ls -k --raw-data work").is(0, "work|Running|AppVM|debian-13|-|a\\b\n");
    let unknown = server.run("qvm-ls --nix");
    assert!(unknown.err.starts_with(
        "usage: qvm-ls [OPTIONS] [VMNAME]...\nqvm-ls: error: unexpected argument '--nix' found"
    ));
    server.run("qvm-ls nobody").fails(2, "qvm-ls: error: no such domain: 'nobody'");
}

#[test]
fn ls_is_sorted_by_a_column_or_by_networks() {
    let server = server(&[
        ("admin.vm.CurrentState work", "mem=409600 power_state=Running"),
        ("admin.vm.CurrentState dom0", "mem=4096000 power_state=Running"),
        ("admin.vm.CurrentState sys-net", "mem=512000 power_state=Paused"),
    ]);
    server
        .run("qvm-ls -O name,label --sort label --all")
        .is(0, "NAME        LABEL\ndom0        black\nwork        blue\ndebian-dvm  red\nsys-net     red\n");
    server
        .run("qvm-ls -O name,memory --sort memory --reverse")
        .is(0, "NAME     MEMORY\ndom0     4000\nsys-net  500\nwork     400\n");
    // Not shown, so not sorted by.
    server.run("qvm-ls -O name --sort memory").is(0, "NAME\ndom0\nsys-net\nwork\n");
    server.run("qvm-ls -O name,state --tree --all").is(
        0,
        "NAME        STATE\ndebian-dvm  Halted\ndom0        Running\nsys-net     Paused\n└─work      Running\n",
    );
    // Whose netvm is not shown has lost nothing but its place.
    server.run("qvm-ls -O name --tree work").is(0, "NAME\nwork\n");
    let columns = server.run("qvm-ls --help-columns");
    assert!(columns.status == 0 && columns.out.contains("\n  ROOT-USED  "), "{}", columns.out);
    let formats = server.run("qvm-ls --help-formats");
    assert!(formats.out.starts_with("Available formats:\n  disk     NAME,STATE,DISK,"), "{}", formats.out);
}

#[test]
fn what_cannot_be_is_said_and_nothing_is_asked() {
    let server = server(&[("admin.label.List dom0", "red\n")]);
    let hint = "root volumes are not filled through this API. Hint: `dispvm-qube add-template NAME --root-image F …` gives a \
                TemplateVM its root";
    server.run("qvm-create -C StandaloneVM -l red -r F new").fails(1, &format!("qvm-create: error: {hint}"));
    server.run("qvm-create -l red --root-move-from F new").fails(1, &format!("qvm-create: error: {hint}"));
    for drive in ["--drive hd:dom0:/x", "--cdrom dom0:/x", "--hddisk x:sda", "--install-windows-tools"] {
        server.run(&format!("qvm-start {drive} debian-dvm")).fails(
            1,
            "Error: a drive cannot be attached: a qube has the volumes of its record, and no others",
        );
    }
    assert_eq!(server.asked(), [""; 0]);
}

#[test]
fn t3_prefs_are_listed_shown_set_and_reset() {
    let server = server(&[
        ("admin.vm.property.Get+netvm work", "default=False type=vm sys-net"),
        ("admin.vm.property.Get+memory work", "default=True type=int 400"),
        ("admin.vm.property.Get+default_dispvm work", "default=True type=vm "),
        ("admin.vm.property.Get+nix work", "!QubesNoSuchPropertyError Invalid property 'nix' of work"),
        ("admin.vm.property.Get+secret work", "!"),
        ("admin.vm.property.Set+template_for_dispvms work True", ""),
        ("admin.vm.property.Set+template_for_dispvms work False", "!QubesVMInUseError Qube is in use"),
        ("admin.vm.property.Set+netvm work", ""),
        ("admin.vm.property.Reset+netvm work", ""),
        ("admin.vm.property.List work", "netvm\nmemory\n"),
        (
            "admin.vm.property.Help+netvm work",
            "VM that provides network connection to this domain, or none if it is to be offline.",
        ),
        ("admin.vm.property.Help+memory work", "Memory currently available for this VM."),
    ]);
    server.run("qvm-prefs work").is(
        0,
        "debug           D  False\n\
         default_dispvm  D  None\n\
         kernelopts      D  a\\b\n\
         label           -  blue\n\
         maxmem          U\n\
         memory          D  400\n\
         netvm           -  sys-net\n\
         template        -  debian-13\n",
    );
    server.run("qvm-prefs --hide-default work").is(
        0,
        "label           -  blue\nmaxmem          U\nnetvm           -  sys-net\ntemplate        -  debian-13\n",
    );
    server.run("qvm-prefs work netvm").is(0, "sys-net\n");
    server.run("qvm-prefs --get work default-dispvm").is(0, "");
    server.run("qvm-prefs --hide-default work memory").is(0, "");
    server.run("qvm-prefs work nix").fails(2, "qvm-prefs: error: no such property: 'nix'");
    server.run("qvm-prefs work secret").fails(1, "qvm-prefs: error: Failed to access 'secret' property");
    server.run("qvm-prefs nobody netvm").fails(2, "qvm-prefs: error: no such domain: 'nobody'");
    server.asked();
    server.run("qvm-prefs work template_for_dispvms True").is(0, "");
    server.run("qvm-prefs --set work netvm none").is(0, "");
    server.run("qvm-prefs -D work netvm").is(0, "");
    server.run("qvm-prefs --unset work netvm").is(0, "");
    assert_eq!(
        server.asked(),
        [
            "admin.vm.property.Set+template_for_dispvms work True",
            "admin.vm.property.Set+netvm work",
            "admin.vm.property.Reset+netvm work",
            "admin.vm.property.Reset+netvm work",
        ]
    );
    server.run("qvm-prefs work template_for_dispvms False").fails(1, "qvm-prefs: error: Qube is in use");
    server.run("qvm-prefs --help-properties work").is(
        0,
        "  memory  Memory currently available for this VM.\n  \
           netvm   VM that provides network connection to this domain, or none if it is\n            to be offline.\n",
    );
}

#[test]
fn t4_the_default_dispvm_is_a_property_of_the_system() {
    let server = Server::new(&[
        (
            "admin.property.GetAll dom0",
            "default_dispvm default=False type=vm debian-dvm\nclockvm default=True type=vm \n",
        ),
        ("admin.property.Get+default_dispvm dom0", "default=False type=vm debian-dvm"),
        ("admin.property.Set+default_dispvm dom0 whonix-dvm", ""),
        ("admin.property.Reset+default_dispvm dom0", ""),
    ]);
    server.run("qubes-prefs").is(0, "clockvm         D  None\ndefault_dispvm  -  debian-dvm\n");
    server.run("qubes-prefs default_dispvm").is(0, "debian-dvm\n");
    server.run("qubes-prefs default_dispvm whonix-dvm").is(0, "");
    server.run("qubes-prefs -D default_dispvm").is(0, "");
    assert_eq!(server.asked().last().unwrap(), "admin.property.Reset+default_dispvm dom0");
}

#[test]
fn features_are_listed_shown_set_and_deleted() {
    let server = server(&[
        ("admin.vm.feature.List work", "gui\nappmenus-dispvm\n"),
        ("admin.vm.feature.Get+gui work", ""),
        ("admin.vm.feature.Get+appmenus-dispvm work", "1"),
        ("admin.vm.feature.Get+nix work", "!QubesFeatureNotFoundError Feature not set for domain work: nix"),
        ("admin.vm.feature.Set+appmenus-dispvm work 1", ""),
        ("admin.vm.feature.Remove+gui work", ""),
        (
            "admin.vm.feature.Remove+nix work",
            "!QubesFeatureNotFoundError Feature not set for domain work: nix",
        ),
    ]);
    server.run("qvm-features work").is(0, "gui              \nappmenus-dispvm  1\n");
    server.run("qvm-features work appmenus-dispvm").is(0, "1\n");
    server.run("qvm-features work nix").is(1, "");
    server.run("qvm-features work appmenus-dispvm 1").is(0, "");
    assert_eq!(server.asked().last().unwrap(), "admin.vm.feature.Set+appmenus-dispvm work 1");
    server.run("qvm-features --delete work gui").is(0, "");
    assert_eq!(server.asked().last().unwrap(), "admin.vm.feature.Remove+gui work");
    server.run("qvm-features --unset work nix").is(0, "");
    server.run("qvm-features -D work").fails(2, "qvm-features: error: --unset requires a feature");
    server
        .run("qvm-features -D work gui 1")
        .fails(2, "qvm-features: error: cannot both set and unset a value");
}

#[test]
fn tags_are_listed_queried_added_and_deleted() {
    let server = server(&[
        ("admin.vm.tag.List work", "mine\ncreated-by-dom0\n"),
        ("admin.vm.tag.Get+mine work", "1"),
        ("admin.vm.tag.Get+other work", "0"),
        ("admin.vm.tag.Set+a work", ""),
        ("admin.vm.tag.Set+b work", ""),
        ("admin.vm.tag.Remove+a work", ""),
        ("admin.vm.tag.Remove+nix work", "!QubesTagNotFoundError Tag not set for domain work: nix"),
        ("admin.vm.tag.Set+no! work", "!QubesValueError Invalid tag: 50%s"),
    ]);
    server.run("qvm-tags work").is(0, "created-by-dom0\nmine\n");
    server.run("qvm-tags work list mine").is(0, "mine\n");
    server.run("qvm-tags work query other").is(1, "");
    server.asked();
    server.run("qvm-tags work add a b").is(0, "");
    assert_eq!(server.asked(), ["admin.vm.tag.Set+a work", "admin.vm.tag.Set+b work"]);
    server.run("qvm-tags work del a").is(0, "");
    server.run("qvm-tags work unset nix").is(0, "");
    server.run("qvm-tags work add no!").fails(1, "qvm-tags: error: Invalid tag: 50%s");
}

#[test]
fn create_makes_a_qube_and_sets_its_properties() {
    let server = Server::new(&[
        ("admin.label.List dom0", "red\nblue\n"),
        ("admin.vmclass.List dom0", "TemplateVM\nAppVM\n"),
        ("admin.vm.Create.DispVM+debian-dvm dom0 name=mine label=red", ""),
        ("admin.vm.Create.AppVM dom0 name=new label=blue", ""),
        ("admin.vm.Create.AppVM dom0 name=work label=blue", "!QubesVMAlreadyExistsError Domain exists"),
        ("admin.vm.CreateInPool.AppVM dom0 name=new label=red pool:private=ram", ""),
        ("admin.vm.property.Set+memory new 500", ""),
        ("admin.vm.property.Set+memory new much", "!QubesPropertyValueError Invalid value"),
    ]);
    server.run("qvm-create -C DispVM -t debian-dvm -l red mine").is(0, "");
    assert_eq!(
        server.asked(),
        ["admin.label.List dom0", "admin.vm.Create.DispVM+debian-dvm dom0 name=mine label=red"]
    );
    server.run("qvm-create --property memory=500 --prop label=blue new").is(0, "");
    assert_eq!(server.asked().last().unwrap(), "admin.vm.property.Set+memory new 500");
    server.run("qvm-create -l red -p private=ram new").is(0, "");
    server.run("qvm-create -l blue work").fails(1, "Error creating VM: Domain exists");
    let failed = server.run("qvm-create -l blue --property memory=much new");
    failed.fails(2, "Error setting property memory (but VM created): Invalid value");
    server.run("qvm-create new").fails(2, "qvm-create: error: --label option is mandatory");
    server.run("qvm-create -l red").fails(2, "qvm-create: error: VMNAME is mandatory");
    server
        .run("qvm-create -l pink x")
        .fails(2, "qvm-create: error: no such label: 'pink'; available: 'red', 'blue'");
    server.run("qvm-create --help-classes").is(0, "AppVM\nTemplateVM\n");
}

/// In the stock client's order.
#[test]
fn clone_copies_settings_and_the_volumes_that_are_kept() {
    let server = server(&[
        WORK,
        ("admin.vm.Create.AppVM+debian-13 dom0 name=new label=blue", ""),
        ("admin.vm.Create.AppVM+debian-13 dom0 name=bad label=blue", ""),
        (
            "admin.vm.CreateInPool.DispVM+debian-13 dom0 name=new label=blue pool:private=ram",
            "!QubesValueError no",
        ),
        ("admin.vm.property.Set+netvm new sys-net", ""),
        ("admin.vm.property.Set+netvm bad sys-net", "!QubesPropertyValueError loops"),
        ("admin.vm.tag.List work", "mine\ncreated-by-dom0\ndisp-created-by-vault\n"),
        ("admin.vm.tag.List new", "theirs\ncreated-by-dom0\n"),
        ("admin.vm.tag.List bad", ""),
        ("admin.vm.tag.Remove+theirs new", ""),
        ("admin.vm.tag.Set+mine new", ""),
        ("admin.vm.tag.Set+mine bad", ""),
        ("admin.vm.feature.List work", "gui\n"),
        ("admin.vm.feature.List new", "theirs\n"),
        ("admin.vm.feature.List bad", ""),
        ("admin.vm.feature.Remove+theirs new", ""),
        ("admin.vm.feature.Get+gui work", "1"),
        ("admin.vm.feature.Set+gui new 1", ""),
        ("admin.vm.feature.Set+gui bad 1", ""),
        ("admin.vm.firewall.Get work", "action=accept\n"),
        ("admin.vm.firewall.Set new action=accept\n", ""),
        ("admin.vm.firewall.Set bad action=accept\n", ""),
        ("admin.vm.volume.List new", "root\nprivate\n"),
        ("admin.vm.volume.List bad", ""),
        ("admin.vm.volume.Info+root new", "size=1\nsave_on_stop=False\n"),
        ("admin.vm.volume.Info+private new", "size=1\nsave_on_stop=True\n"),
        ("admin.vm.volume.CloneFrom+private work", "t0k3n"),
        ("admin.vm.volume.CloneTo+private new t0k3n", ""),
        ("admin.vm.Remove bad", ""),
    ]);
    server.run("qvm-clone work new").is(0, "");
    let asked = server.asked();
    let at = |call: &str| asked.iter().position(|line| line == call);
    let (volume, last) =
        (at("admin.vm.volume.CloneTo+private new t0k3n"), at("admin.vm.property.Set+netvm new sys-net"));
    assert!(
        volume.is_some() && volume < last,
        "nothing is made from it before its volumes are there: {asked:?}"
    );
    assert!(
        at("admin.vm.tag.Remove+theirs new").is_some() && at("admin.vm.feature.Remove+theirs new").is_some()
    );
    assert!(
        !asked.iter().any(|line| line.contains("created-by") || line.contains("+root work")),
        "{asked:?}"
    );
    server.run("qvm-clone work bad").fails(1, "qvm-clone: error: Failed to set netvm property: loops");
    assert_eq!(server.asked().last().unwrap(), "admin.vm.Remove bad");
    let told = server.run("qvm-clone --ignore-errors work bad");
    assert_eq!((told.status, told.err.as_str()), (0, "bad: Failed to set netvm property: loops\n"));
    server.run("qvm-clone -C DispVM -p private=ram work new").fails(1, "qvm-clone: error: no");
    server.run("qvm-clone nix new").fails(2, "qvm-clone: error: no such domain: 'nix'");
}

#[test]
fn a_clone_that_is_interrupted_is_removed() {
    let clone = "admin.vm.volume.CloneTo+private new t0k3n";
    let create = "admin.vm.Create.AppVM+debian-13 dom0 name=new label=blue";
    let server = server(&[
        WORK,
        (create, "~"),
        ("admin.vm.volume.List new", "private\n"),
        ("admin.vm.volume.Info+private new", "size=1\nsave_on_stop=True\n"),
        ("admin.vm.volume.CloneFrom+private work", "t0k3n"),
        (clone, "~"),
        ("admin.vm.firewall.Get work", "action=accept\n"),
        ("admin.vm.firewall.Set new action=accept\n", "~"),
        ("admin.vm.Remove new", ""),
        ("admin.vm.tag.List work", ""),
        ("admin.vm.tag.List new", ""),
        ("admin.vm.feature.List work", ""),
        ("admin.vm.feature.List new", ""),
        ("admin.vm.property.Set+netvm new sys-net", ""),
    ]);
    for (during, signal, status) in [
        (create, Signal::SIGTERM, 143),
        (clone, Signal::SIGINT, 130),
        ("admin.vm.firewall.Set new action=accept\n", Signal::SIGHUP, 129),
    ] {
        let mut command = server.command("qvm-clone");
        let ended = server.interrupt(command.args(["--ignore-errors", "work", "new"]), during, signal);
        ended.fails(status, "qvm-clone: error: interrupted");
        let asked = server.asked();
        assert_eq!(asked.last().unwrap(), "admin.vm.Remove new", "{during}: {asked:?}");
        assert!(!asked.iter().any(|line| line.contains("netvm new")), "{during}: {asked:?}");
    }
    // As under nohup, or in the background of a script.
    let tool = server.command("qvm-clone");
    let mut ignores = Command::new("sh");
    ignores.args(["-c", "trap '' INT HUP; exec \"$0\" qvm-clone work new"]).arg(tool.get_program());
    ignores.envs(tool.get_envs().filter_map(|(name, value)| Some((name, value?))));
    server.interrupt(&mut ignores, clone, Signal::SIGINT).is(0, "");
    assert!(!server.asked().iter().any(|line| line.starts_with("admin.vm.Remove")));
}

#[test]
fn remove_asks_first_and_says_what_a_qube_is_needed_for() {
    let server = server(&[
        ("admin.vm.Remove work", ""),
        ("admin.vm.Remove sys-net", "!QubesVMInUseError Domain is in use: 'sys-net'"),
        ("admin.property.GetAll dom0", "default_netvm default=False type=vm sys-net\n"),
    ]);
    server.run("qvm-remove -f work").is(0, "");
    assert_eq!(server.asked(), ["admin.vm.Remove work"]);
    let answered = |answer: &str| {
        let mut child = server
            .command("qvm-remove")
            .arg("work")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(answer.as_bytes()).unwrap();
        Ended::of(child.wait_with_output().unwrap())
    };
    let no = answered("\n");
    assert_eq!((no.status, &no.out[..]), (1, "  work\nAre you sure? [y/N] "));
    assert_eq!(no.err, "This will completely remove the selected VM(s)...\nRemove cancelled.\n");
    assert_eq!(server.asked(), [""; 0]);
    assert_eq!(answered("y\n").status, 0);
    assert_eq!(server.asked(), ["admin.vm.Remove work"]);
    let used = server.run("qvm-remove -f sys-net");
    assert_eq!(used.status, 1);
    assert_eq!(
        used.err,
        "VM sys-net cannot be removed. It is in use as:\n - global property default_netvm\n - netvm for work\n\
         qvm-remove: error: Domain is in use: 'sys-net'\n"
    );
    server.run("qvm-remove -f dom0").fails(1, "Domain 'dom0' cannot be removed.");
}

#[test]
fn qubes_are_started_paused_and_killed() {
    let server = server(&[
        ("admin.vm.Start debian-dvm", ""),
        ("admin.vm.Pause work", ""),
        ("admin.vm.Unpause sys-net", ""),
        ("admin.vm.Unpause work", "!QubesVMNotPausedError Domain is not paused: 'work'"),
        ("admin.vm.Kill work", ""),
        ("admin.vm.Kill debian-dvm", "!QubesVMNotStartedError Domain is powered off: 'debian-dvm'"),
        ("admin.vm.Kill sys-net", "!StoragePoolException no"),
    ]);
    server.run("qvm-start debian-dvm").is(0, "");
    server.run("qvm-start work").fails(1, "Error: domain work is already running");
    server.run("qvm-start --skip-if-running work debian-dvm").is(0, "");
    assert_eq!(server.asked(), ["admin.vm.Start debian-dvm", "admin.vm.Start debian-dvm"]);
    server.run("qvm-pause work").is(0, "");
    server.run("qvm-unpause work sys-net").fails(1, "Error: Domain is not paused: 'work'");
    assert_eq!(server.asked(), ["admin.vm.Pause work", "admin.vm.Unpause work", "admin.vm.Unpause sys-net"]);
    server.run("qvm-kill work debian-dvm").is(0, "");
    server.run("qvm-kill --all").fails(1, "Error: Failed to kill 'sys-net': no");
    server
        .run("qvm-kill")
        .fails(2, "qvm-kill: error: the following required arguments were not provided: <VMNAME>...");
}

#[test]
fn shutdown_waits_and_kills_who_does_not_go() {
    let server = Server::new(&[
        LIST,
        ("admin.vm.List dom0", "work class=AppVM state=Running\n"),
        ("admin.vm.List dom0", "work class=AppVM state=Halted\n"),
        ("admin.vm.Shutdown work", ""),
    ]);
    server.run("qvm-shutdown --wait work").is(0, "");
    assert_eq!(server.asked(), ["admin.vm.Shutdown work"]);
    let server = Server::new(&[
        LIST,
        ("admin.vm.Shutdown+force work", ""),
        ("admin.vm.Shutdown debian-dvm", "!QubesVMNotStartedError Domain is powered off"),
        ("admin.vm.Shutdown sys-net", "!QubesVMInUseError work uses it"),
        ("admin.vm.Kill work", ""),
    ]);
    server.run("qvm-shutdown debian-dvm").is(0, "");
    server.run("qvm-shutdown sys-net").fails(1, "qvm-shutdown: error: Failed to shut down: sys-net");
    server.asked();
    server
        .run("qvm-shutdown --wait --force --timeout 0.1 work")
        .fails(1, "qvm-shutdown: error: Failed to shut down: work");
    assert_eq!(server.asked(), ["admin.vm.Shutdown+force work", "admin.vm.Kill work"]);
}

#[test]
fn a_tool_is_the_one_it_is_called_by() {
    let server = server(&[]);
    let run = |name: &str, args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_qvm"));
        let socket = server.folder.path().join("api.sock");
        Ended::of(command.arg0(name).args(args).arg("--api-socket").arg(socket).output().unwrap())
    };
    run("/usr/bin/qvm-ls", &["--raw-list"]).is(0, "dom0\nsys-net\nwork\n");
    run("qvm", &["ls", "--raw-list"]).is(0, "dom0\nsys-net\nwork\n");
    let none = run("qvm", &["nix"]);
    assert_eq!(none.status, 2);
    assert!(none.err.starts_with("usage: qvm TOOL"), "{}", none.err);
}

#[test]
fn without_a_daemon_the_socket_is_named() {
    let ended = Command::new(env!("CARGO_BIN_EXE_qvm"))
        .args(["qvm-prefs", "--api-socket", "/nonexistent/s", "work"])
        .output();
    let ended = Ended::of(ended.unwrap());
    ended.fails(1, "qvm-prefs: error: Failed to connect to qubesd service: /nonexistent/s: No such file or directory (os error 2)");
}
