//! `qvm-firewall` and `qvm-volume`.

use crate::server::Server;

const LIST: (&str, &str) = (
    "admin.vm.List dom0",
    "work class=AppVM state=Running\ndom0 class=AdminVM state=Running\nweb class=AppVM state=Halted\n",
);

#[test]
fn raw_rules_are_in_the_stock_clients_order_whatever_order_they_are_kept_in() {
    let kept = "action=drop dst4=1.1.1.1/32 dstports=80-80 proto=tcp\n";
    let server = Server::new(&[LIST, ("admin.vm.firewall.Get web", kept)]);
    server.run("qvm-firewall web list --raw").is(0, "action=drop proto=tcp dst4=1.1.1.1/32 dstports=80-80\n");
}

#[test]
fn rules_are_listed_added_and_removed() {
    let rules = "action=accept proto=tcp dsthost=qubes-os.org dstports=443-443\n\
                 action=accept specialtarget=dns\n\
                 action=drop dst4=10.0.0.0/8 comment=no LAN here\n";
    let server = Server::new(&[
        LIST,
        ("admin.vm.firewall.Get work", rules),
        ("admin.vm.firewall.Get web", "action=accept\n"),
        ("admin.vm.firewall.Set web action=drop proto=icmp\naction=accept\n", ""),
        ("admin.vm.firewall.Set web action=accept\naction=accept proto=tcp dst4=1.1.1.1/32 dstports=80-80\n", ""),
        ("admin.vm.firewall.Set web", ""),
        ("admin.vm.firewall.Set work action=accept\n", ""),
        ("admin.vm.firewall.Reload work", ""),
    ]);
    server.run("qvm-firewall work").is(
        0,
        "NO  ACTION  HOST          PROTOCOL  PORT(S)  SPECIAL TARGET  ICMP TYPE  EXPIRE  COMMENT\n\
         0   accept  qubes-os.org  tcp       443      -               -          -       -\n\
         1   accept  -             -         -        dns             -          -       -\n\
         2   drop    10.0.0.0/8    -         -        -               -          -       no LAN here\n",
    );
    server.run("qvm-firewall --raw work list").is(0, rules);
    server.run("qvm-firewall work list --raw").is(0, rules);
    server.asked();
    server.run("qvm-firewall web add --before 0 drop proto=icmp").is(0, "");
    server.run("qvm-firewall web add accept 1.1.1.1 tcp 80").is(0, "");
    server.run("qvm-firewall web del accept").is(0, "");
    server.run("qvm-firewall web del --rule-no 0").is(0, "");
    let asked = server.asked();
    assert_eq!(
        asked.iter().filter(|line| line.contains("Set")).collect::<Vec<_>>(),
        [
            "admin.vm.firewall.Set web action=drop proto=icmp\naction=accept\n",
            "admin.vm.firewall.Set web action=accept\naction=accept proto=tcp dst4=1.1.1.1/32 dstports=80-80\n",
            "admin.vm.firewall.Set web",
            "admin.vm.firewall.Set web",
        ]
    );
    server.run("qvm-firewall -r work reset").is(0, "");
    assert_eq!(
        server.asked(),
        ["admin.vm.firewall.Set work action=accept\n", "admin.vm.firewall.Reload work"]
    );
    server
        .run("qvm-firewall web del drop")
        .fails(1, "Error: no such rule. `qvm-firewall web list` shows those there are");
    server
        .run("qvm-firewall web del --rule-no 1")
        .fails(1, "Error: no such rule. `qvm-firewall web list` shows those there are");
    server
        .run("qvm-firewall web add maybe")
        .fails(2, "qvm-firewall: error: action must be accept or drop or forward, not \"maybe\"");
    server.run("qvm-firewall nobody list").fails(2, "qvm-firewall: error: no such domain: 'nobody'");
}

const PRIVATE: &str =
    "pool=lvm\nvid=vm-work-private\nsize=2147483648\nusage=1024\nrw=True\nsource=\nsave_on_stop=True\n\
                       snap_on_start=False\nrevisions_to_keep=1\nephemeral=False\nis_outdated=False\n";

fn volumes() -> Server {
    let kernel = "pool=linux-kernel\nvid=6.1\nsize=1\nusage=1\nrw=False\n";
    Server::new(&[
        LIST,
        ("admin.pool.List dom0", "lvm\nlinux-kernel\n"),
        ("admin.vm.volume.List dom0", ""),
        ("admin.vm.volume.List work", "private\nkernel\n"),
        ("admin.vm.volume.List web", "kernel\n"),
        ("admin.vm.volume.Info+private work", PRIVATE),
        ("admin.vm.volume.Info+kernel work", kernel),
        ("admin.vm.volume.Info+kernel web", kernel),
        ("admin.vm.volume.ListSnapshots+private work", "1-back\n2-back\n"),
        ("admin.vm.volume.ListSnapshots+kernel work", ""),
        ("admin.vm.volume.ListSnapshots+kernel web", ""),
        ("admin.vm.volume.Set.revisions_to_keep+private work 3", ""),
        ("admin.vm.volume.Set.rw+private work maybe", "!ProtocolError Invalid value"),
        ("admin.vm.volume.Resize+private work 10737418240", ""),
        ("admin.vm.volume.Resize+private work 1000", ""),
        ("admin.vm.volume.Revert+private work 2-back", ""),
        ("admin.vm.volume.Revert+private work 1-back", ""),
    ])
}

#[test]
fn volumes_are_listed_and_shown() {
    let server = volumes();
    server.run("qvm-volume").is(
        0,
        "POOL:VOLUME          VMNAME  VOLUME_NAME  REVERT_POSSIBLE\n\
         linux-kernel:6.1     work    kernel       No\n\
         linux-kernel:6.1     web     kernel       No\n\
         lvm:vm-work-private  work    private      Yes\n",
    );
    server.run("qvm-volume ls -p lvm work").is(
        0,
        "POOL:VOLUME          VMNAME  VOLUME_NAME  REVERT_POSSIBLE\nlvm:vm-work-private  work    private      Yes\n",
    );
    server.run("qvm-volume ls -p lvm -p none").fails(2, "qvm-volume: error: No such pools: ['lvm', 'none']");
    server.run("qvm-volume info work:private").is(
        0,
        "pool               lvm\nvid                vm-work-private\nrw                 True\nsource             \n\
         save_on_stop       True\nsnap_on_start      False\nsize               2147483648\nusage              1024\n\
         revisions_to_keep  1\nephemeral          False\nis_outdated        False\n\
         List of available revisions (for revert):\n  1-back\n  2-back\n",
    );
    server.run("qvm-volume info work:private size").is(0, "2147483648\n");
    server.run("qvm-volume i work:private revisions").is(0, "1-back\n2-back\n");
    server.run("qvm-volume info work:private path").fails(1, "Error: No such property: path");
    server.run("qvm-volume info work:nix").fails(1, "qvm-volume: error: vm 'work' has no volume 'nix'");
    server.run("qvm-volume info nix:root").fails(1, "qvm-volume: error: no vm 'nix'");
    server
        .run("qvm-volume info work")
        .fails(2, "qvm-volume: error: expected a vm & volume combination like foo:bar");
}

#[test]
fn volumes_are_configured_resized_and_reverted() {
    let server = volumes();
    let last = || server.asked().pop().unwrap();
    server.run("qvm-volume config work:private revisions_to_keep 3").is(0, "");
    assert_eq!(last(), "admin.vm.volume.Set.revisions_to_keep+private work 3");
    server.run("qvm-volume set work:private rw maybe").fails(1, "Error: Invalid value");
    server.run("qvm-volume config work:private size 3").fails(1, "Error: Invalid property: size");
    server.run("qvm-volume resize work:private 10GiB").is(0, "");
    assert_eq!(last(), "admin.vm.volume.Resize+private work 10737418240");
    let shrinks = server.run("qvm-volume resize work:private 1000");
    assert!(shrinks.err.contains("shrinking of private is disabled (1000 < 2147483648)"), "{}", shrinks.err);
    assert_eq!((shrinks.status, last().contains("Resize")), (1, false));
    server.run("qvm-volume extend -f work:private 1k").is(0, "");
    assert_eq!(last(), "admin.vm.volume.Resize+private work 1000");
    server.run("qvm-volume revert work:private").is(0, "");
    assert_eq!(last(), "admin.vm.volume.Revert+private work 2-back");
    server.run("qvm-volume revert work:private 1-back").is(0, "");
    server.run("qvm-volume revert web:kernel").fails(1, "Error: No snapshots available");
}
