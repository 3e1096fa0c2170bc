//! The seeds of the corpora are what real savefiles, frames and records are today: a format that changes shows in them.
//! `UPDATE_SEEDS=1 cargo test -p fuzz-harness --test seeds` writes them anew.

#[path = "../../../engine/tests/common/mod.rs"]
mod common;

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::{Guest, Page};
use engine::savefile::{ChunkTable, Header, Savefile, SectionKind};
use engine::units::{ByteCount, PageRange};
use fuzz_harness::sealed::{parse, recipe, seal, Part};
use qrexec::*;
use xen_glue::layout::Layout;
use xen_glue::stream::config::NicConfig;
use xen_glue::stream::xl_header::ConfigText;

/// Guests saved by xl, with all but two pages taken out.
const XL_PVH: &[u8] = include_bytes!("../../../xen-glue/tests/fixtures/xl-4.17-pvh.stream");
const XL_PV: &[u8] = include_bytes!("../../../xen-glue/tests/fixtures/xl-4.17-pv.stream");
/// qcow2's mark of a cluster with one reference.
const COPIED: u64 = 1 << 63;

/// A seed must be these bytes.
fn keep(target: &str, name: &str, bytes: impl AsRef<[u8]>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../corpus").join(target);
    let path = folder.join(format!("seed-{name}"));
    if std::env::var_os("UPDATE_SEEDS").is_some() {
        fs::create_dir_all(&folder).unwrap();
        fs::write(&path, &bytes).unwrap();
    }
    let kept = fs::read(&path).unwrap_or_default();
    assert!(kept == bytes.as_ref(), "{} is not what is made now: UPDATE_SEEDS=1 writes it", path.display());
}

/// Guests whose savefiles have one chunk, none, one that does not compress, and two.
fn guests() -> Vec<(&'static str, Guest)> {
    let empty = Guest { memory: vec![Page::Hole; 4], changed: vec![], ..Guest::small() };
    let noise =
        Guest { memory: vec![Page::Noise(1), Page::Hole], working_set: vec![(0, 1)], ..Guest::small() };
    let mut many = Guest::small();
    many.memory =
        (0..280).map(|page| if page % 3 == 0 { Page::Fill((page / 3) as u8) } else { Page::Hole }).collect();
    many.working_set = vec![(9, 3), (200, 80)];
    vec![("small", Guest::small()), ("empty", empty), ("noise", noise), ("many", many)]
}

#[test]
fn seeds_of_savefiles() {
    let folder = tempfile::tempdir().unwrap();
    for (name, guest) in guests() {
        let path = folder.path().join(name);
        guest.write(&path).unwrap();
        let bytes = fs::read(&path).unwrap();
        let header = Header::parse(&bytes[..4096], ByteCount(bytes.len() as u64)).unwrap();
        let parts: Vec<Part> = header.sections().iter().map(|section| part(&bytes, section)).collect();
        assert_eq!(parse(&recipe(&parts)), parts);
        assert!(seal(parts.clone()) == bytes, "a recipe gives the very file the writer writes");
        keep("savefile", name, &bytes);
        keep("savefile_sealed", name, recipe(&parts));
        keep("header", name, &bytes[12..640]);
        let savefile = Savefile::open(&path, None).unwrap();
        let table: &ChunkTable = savefile.chunk_table();
        let data = header.the(SectionKind::ChunkData).unwrap();
        let words = [data.offset.0 as u32, data.length.0 as u32];
        keep(
            "chunk_table",
            name,
            [words[0].to_le_bytes().to_vec(), words[1].to_le_bytes().to_vec(), table.to_bytes()].concat(),
        );
        for (nth, map) in savefile.page_maps().iter().enumerate() {
            let slots = (table.slots().0 as u32).to_le_bytes().to_vec();
            keep("page_map", &format!("{name}-{nth}"), [slots, map.to_bytes()].concat());
        }
        keep("manifest", name, savefile.manifest().to_bytes().unwrap());
        keep("device_state", name, savefile.device_state().unwrap().to_bytes().unwrap());
        let index = serde_json::json!({ "manifest": savefile.manifest(), "device_state_kind": "qemu-migration",
            "device_state_version": 7, "deltas": [["root", "root.qcow2"]] });
        keep("hot_index", name, index.to_string());
    }
}

fn part(file: &[u8], section: &engine::savefile::Section) -> Part {
    let kind = match section.kind {
        SectionKind::Manifest => 1,
        SectionKind::DeviceState => 2,
        SectionKind::PageMap => 3,
        SectionKind::ChunkTable => 4,
        SectionKind::ChunkData => 5,
        SectionKind::Unknown(other) => other as u8,
    };
    let start = section.offset.0 as usize;
    Part { kind, flags: 0, bytes: file[start..start + section.length.0 as usize].to_vec() }
}

#[test]
fn seeds_of_streams() {
    let stream = |seed: u16, frames: &[u8]| [&seed.to_le_bytes()[..], frames].concat();
    let hello = Hello {
        protocol: PROTOCOL,
        agent_version: "0.1.0".into(),
        kernel: "6.1.0".into(),
        session: true,
        frozen: false,
    };
    let failed = Failed { op: Some(Op::Exec), step: "start".into(), errno: 13, message: "denied".into() };
    let said = |frames: &[GuestFrame]| {
        let mut out = Vec::new();
        frames.iter().for_each(|frame| frame.encode(&mut out));
        out
    };
    let build = [
        GuestFrame::Hello(hello.clone()),
        GuestFrame::FreeMemory(1 << 20),
        GuestFrame::Done(Op::Settle),
        GuestFrame::Done(Op::Freeze),
        GuestFrame::Pong(7),
    ];
    let launch = [
        GuestFrame::Done(Op::Identify),
        GuestFrame::StdinCredit { stream: 1, bytes: 65536 },
        GuestFrame::Stdout { stream: 1, bytes: b"hello\n".to_vec() },
        GuestFrame::Stderr { stream: 1, bytes: vec![0; 40] },
        GuestFrame::StdinClosed { stream: 1 },
        GuestFrame::StdoutEof { stream: 1 },
        GuestFrame::StderrEof { stream: 1 },
        GuestFrame::Exited { stream: 1, exit: Exit::Code(7) },
        GuestFrame::Exited { stream: 2, exit: Exit::Signal(9) },
        GuestFrame::Exited { stream: 3, exit: Exit::NotFound(2) },
    ];
    keep("guest_stream", "build", stream(1, &said(&build)));
    keep("guest_stream", "launch", stream(2, &said(&launch)));
    let call = CALL_STREAM | 7;
    let calls = [
        GuestFrame::Call { stream: call, call: Call::parse(b"@dispvm", b"qubes.OpenURL+x").unwrap() },
        GuestFrame::CallStdin { stream: call, bytes: b"abc".to_vec() },
        GuestFrame::CallStdinEof { stream: call },
        GuestFrame::CallStdoutCredit { stream: call, bytes: 65536 },
        GuestFrame::CallStderrCredit { stream: call, bytes: 65536 },
        GuestFrame::CallHangup { stream: call },
    ];
    keep("guest_stream", "calls", stream(4, &said(&calls)));
    keep("guest_stream", "failed", stream(3, &said(&[GuestFrame::Failed { stream: 1, failed }])));

    let network = Network {
        address: Ipv4Addr::new(10, 137, 0, 5),
        prefix_len: 32,
        gateway: Some(Ipv4Addr::new(10, 137, 0, 1)),
        dns: vec![Ipv4Addr::new(10, 139, 1, 1)],
    };
    let identity = |network| Identity {
        hostname: "disp7".into(),
        machine_id: [1; 16],
        entropy: [2; ENTROPY_BYTES],
        realtime_ns: 1_700_000_000_000_000_000,
        mac: [2, 0, 0, 0, 0, 1],
        network,
    };
    let exec = Exec {
        env: vec![(b"A".to_vec(), b"b".to_vec())],
        cwd: Some(b"/tmp".to_vec()),
        user: User::Root,
        ..Exec::user(["sh", "-c", "exit 7"])
    };
    let asked = |frames: &[HostFrame]| {
        let mut out = Vec::new();
        frames.iter().for_each(|frame| frame.encode(&mut out).unwrap());
        out
    };
    let build = [
        HostFrame::Prerun(b"#!/bin/sh\n".to_vec()),
        HostFrame::Prerun(vec![]),
        HostFrame::Settle,
        HostFrame::Warm,
        HostFrame::Freeze,
        HostFrame::Ping(7),
        HostFrame::ServeCalls,
        HostFrame::Shutdown,
    ];
    let launch = [
        HostFrame::Identify(Box::new(identity(Some(network)))),
        HostFrame::Exec { stream: 1, exec: Box::new(exec) },
        HostFrame::Thaw,
    ];
    let session = [
        HostFrame::Identify(Box::new(identity(None))),
        HostFrame::Stdin { stream: 1, bytes: b"abc".to_vec() },
        HostFrame::StdinEof { stream: 1 },
        HostFrame::StdoutCredit { stream: 1, bytes: 65536 },
        HostFrame::StderrCredit { stream: 1, bytes: 65536 },
        HostFrame::Signal { stream: 1, signal: 15 },
    ];
    let calls = [
        HostFrame::CallAccepted { stream: call },
        HostFrame::CallStdout { stream: call, bytes: b"abc".to_vec() },
        HostFrame::CallStderr { stream: call, bytes: b"abc".to_vec() },
        HostFrame::CallStdoutEof { stream: call },
        HostFrame::CallStderrEof { stream: call },
        HostFrame::CallStdinCredit { stream: call, bytes: 65536 },
        HostFrame::CallStdinClosed { stream: call },
        HostFrame::CallExited { stream: call, exit: Exit::Code(7) },
        HostFrame::CallRefused { stream: call | 1 },
    ];
    let streams = [("build", &build[..]), ("launch", &launch), ("session", &session), ("calls", &calls)];
    for (name, frames) in streams {
        keep("host_stream", name, stream(5, &asked(frames)));
    }
}

#[test]
fn seeds_of_records() {
    keep(
        "qube_record",
        "template",
        r#"name = "qube"
label = "black"

[class.TemplateVM]
generation = 3
root_hash = "ab12"
root_bytes = 2147483648
kernel_hash = "00"
initrd_hash = "01"
cmdline = "root=/dev/vda rw quiet"
"#,
    );
    keep(
        "qube_record",
        "dvm",
        r#"name = "qube"
label = "red"

[class.AppVM]
template = "debian-12"
template_for_dispvms = true
memory_mib = 1024
vcpus = 2
net = "tap:vif0"
private_mib = 2048
private_generation = 1
private_id = "x"
volatile_mib = 1024

[class.AppVM.savefile]
generation = 4
root_hash = "5dcb16151ca4bb04887769f7f709eb89975e00d15dc720b175f66b83cba795fb"
inputs = "77"
"#,
    );
    keep(
        "clone_record",
        "disp7",
        r#"{"name":"disp7","dvm":"debian-dvm","root_hash":"","template":["debian-12",1],"pid":4711,"keeping":"keeper","started":1700000000}"#,
    );
    let spare = r#"{"number":7,"machine_id":[1,2,3,4,5,6,71,8,137,10,11,12,13,14,15,16],"host":"qemu","generation":3,"root_hash":"ab","inputs":"cd","ready_ms":1700000000000,"protocol":2}"#;
    for (name, message) in [
        ("hello-spare", r#"{"spare":{"dvm":"debian-dvm","settings":"(None, 1)","rebuild":true}}"#.to_owned()),
        ("hello-keeper", r#"{"keeper":{"protocol":2,"dvm":"debian-dvm","pid":4711}}"#.to_owned()),
        ("hello-status", r#""status""#.to_owned()),
        ("hears", r#""handed_out""#.to_owned()),
        ("gone", r#""gone""#.to_owned()),
        ("none", r#"{"none":{"rebuilding":true}}"#.to_owned()),
        ("spare", format!(r#"{{"spare":{spare}}}"#)),
        ("ready", format!(r#"{{"ready":{spare}}}"#)),
        ("ready-before-2", format!(r#"{{"ready":{}}}"#, spare.replace(r#","protocol":2"#, ""))),
        ("failed", r#"{"failed":{"reason":"a volume is full"}}"#.to_owned()),
        ("status", r#"{"status":{"pid":1,"dvms":[{"dvm":"d","savefile":"fresh","spares_wanted":2,"spares_ready":1,"spares_preparing":1,"rebuilding":false,"last_failure":"x"}],"kept":["disp7"]}}"#.to_owned()),
    ] {
        keep("control_socket", name, message);
    }
}

#[test]
fn seeds_of_qemus() {
    let greeting = r#"{"QMP": {"version": {"qemu": {"micro": 9, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}
{"return": {}, "id": "hello"}
"#;
    let answered = r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "RESUME"}
{"return": {"status": "running", "running": true}, "id": "asked"}
{"event": "BLOCK_IO_ERROR", "data": {"device": "", "node-name": "root", "nospace": true, "action": "stop", "reason": "x", "operation": "write"}}
"#;
    let refused = r#"{"error": {"class": "GenericError", "desc": "no such thing"}, "id": "asked"}
{"error": {"class": "GenericError", "desc": "no"}, "id": "posted"}
{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}
"#;
    keep("qmp", "answered", ["\u{1}", greeting, answered].concat());
    keep("qmp", "refused", ["\u{2}", greeting, refused].concat());

    // Volumes of 600 pages: an untouched overlay as a file, and recipes for one with data, zeros and both.
    let file = tempfile::tempfile().unwrap();
    qemu_glue::qcow2::write_empty(&file, ByteCount(600 * 4096)).unwrap();
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    let pages = 599u16.to_le_bytes();
    keep("qcow2", "file", [&pages[..], &[0], &bytes].concat());
    let patch = |place: u64, bytes: &[u8]| [&place.to_le_bytes()[..3], &[bytes.len() as u8], bytes].concat();
    // Header, refcount table, L1 table, refcount block; the L2 table is put behind them, its data behind that.
    let l1 = patch(2 * 4096, &((4 * 4096u64) | COPIED).to_be_bytes());
    let data = patch(4 * 4096 + 8 * 5, &((5 * 4096u64) | COPIED).to_be_bytes());
    let zero = patch(4 * 4096 + 8 * 9, &1u64.to_be_bytes());
    let content = patch(5 * 4096, b"what the guest wrote");
    let clusters = [6];
    keep("qcow2", "data", [&pages[..], &clusters, &l1, &data, &content].concat());
    keep("qcow2", "zeros", [&pages[..], &clusters, &l1, &zero].concat());
    keep("qcow2", "both", [&pages[..], &clusters, &l1, &data, &content, &zero].concat());
}

#[test]
fn seeds_of_xen_guests() {
    for (name, bytes) in [("pvh", XL_PVH), ("pv", XL_PV)] {
        keep("xl_stream", name, bytes);
        let length = u32::from_le_bytes(bytes[48..52].try_into().unwrap()) as usize;
        keep("xl_config", name, &bytes[52..52 + length - 1]);
    }
    let guest = xen_glue::stream::import::survey(XL_PVH).unwrap();
    keep("xen_device_state", "pvh", guest.state.to_bytes());
    let mut small = guest;
    (small.state.hvm_context, small.state.cpuid_policy, small.state.msr_policy) =
        (vec![1; 20], vec![2; 48], vec![3; 32]);
    small.state.layout = Layout::new(vec![PageRange::new(0, 1), PageRange::new(0x11, 2)]).unwrap();
    keep("xen_device_state", "small", small.state.to_bytes());
    small.config.nics.push(NicConfig {
        devid: 0,
        mac: Some("00:16:3e:00:00:01".into()),
        bridge: Some("xenbr0".into()),
        script: None,
    });
    let ConfigText::Json(text) = small.config.to_text() else { unreachable!() };
    keep("xl_config", "nic", text);
}

#[test]
fn seeds_of_policies() {
    let words =
        "# opening\ns * @anyvm @dispvm allow\ns +x @tag:t @type:AppVM ask default_target=b notify=yes\n\
                 s * * @dispvm:@tag:t allow target=@dispvm:dvm user=root autostart=no\n\
                 * * uuid:1 @default allow target=dom0\n* * @adminvm * deny notify=no\n* * * @anyvm ask\n";
    keep("policy_file", "rules", ["\0", words].concat());
    keep("policy_file", "default", "\0s * @anyvm @dispvm allow\r\ns * @anyvm @anyvm deny\r\n");
    keep(
        "policy_file",
        "directives",
        "\0!include include/x\n!include-dir include\n!include-service s +x f\n!compat-4.0\n",
    );
    keep(
        "policy_file",
        "legacy",
        "\u{1}# old\n$anyvm $dispvm allow,target=$dispvm:dvm,user=root\n$tag:t dom0 ask, default_target=$adminvm\n\
         @anyvm $anyvm deny\n",
    );
    keep("policy_file", "legacy-include", "\u{1}$include:f\n");
}

#[test]
fn seeds_of_rpc_services() {
    let config =
        "# a comment\r\nwait-for-session = 1 # so\nforce-user='root'\nskip-service-descriptor=true\n\
                  exit-on-client-eof = false\nexit-on-service-eof=true\nother.key = 42";
    keep("rpc_service", "config", ["\0", config].concat());
    for (name, text) in [
        ("both", "/dev/tcp/127.0.0.1/80\0"),
        ("port", "/dev/tcp/fe80::1%1\080"),
        ("none", "/dev/tcp\0++1+22"),
    ] {
        keep("rpc_service", name, ["\u{1}", text].concat());
    }
}

#[test]
fn seeds_of_admin_requests() {
    use admin_api::lines::{Property, Type};
    use admin_api::{Event, Exception, Kind, Reply, Request};

    let request = |request: Request| request.encode().unwrap();
    keep("admin_request", "list", request(Request::new("admin.vm.List", "dom0")));
    let set = Request::new("admin.vm.property.Set", "work").argument("netvm").payload("sys-net");
    keep("admin_request", "set", request(set));
    keep("admin_request", "keyword", b"admin.vm.Start work keyword adminvm\0");
    let gone =
        Exception { arguments: vec!["work".into(), "3".into()], ..Exception::new(Kind::VmNotFound, "") };
    let gone = Exception { format: "%s is gone: %d of 100%%".into(), ..gone };
    keep("admin_request", "exception", Reply::Exception(gone).encode());
    keep(
        "admin_request",
        "event",
        Event::new("work", "property-set:netvm").detail("newvalue", "sys-net").encode(),
    );
    let qubes = "dom0 class=AdminVM state=Running\nwork class=AppVM state=Halted uuid=1-2\n";
    keep("admin_request", "qubes", qubes);
    let lines = Property::new(true, Type::Str, "a\\b\nc").encode_line("kernelopts")
        + &Property::new(false, Type::Vm, "").encode_line("netvm");
    keep("admin_request", "properties", lines);
}

#[test]
fn seeds_of_transfers() {
    use filecopy::Header;
    let entry = |name: &str, mode: u32, content: &str| {
        let (name_bytes, content_bytes) = (name.len() as u32 + 1, content.len() as u64);
        let header =
            Header { name_bytes, mode, content_bytes, modified: (1_600_000_000, 1), ..Header::default() };
        [&header.encode()[..], name.as_bytes(), b"\0", content.as_bytes()].concat()
    };
    let folder = |name| entry(name, 0o040755, "");
    let inside = [
        folder("a/b"),
        entry("a/b/file", 0o100644, "content"),
        entry("a/b/link", 0o120777, "../file"),
        folder("a/b"),
    ];
    let end = Header::default().encode().to_vec();
    let tree = [folder("a"), inside.concat(), folder("a"), end.clone()].concat();
    keep("filecopy", "tree", tree);
    keep("filecopy", "file", [entry("file", 0o100755, "x"), end.clone()].concat());
    keep(
        "filecopy",
        "out",
        [folder("a"), entry("a/l", 0o120777, "../x"), entry("a/../x", 0o100644, "x"), end].concat(),
    );
}

#[test]
fn seeds_of_calls() {
    use control_plane::calls::message::{Answer, Control, Message};
    use qrexec::service::CommandLine;
    use qrexec::stock::control::{Endpoint, RequestId, Trigger};
    use qrexec::stock::{FromAgent, ToAgent, Version};

    let exec = Exec { env: vec![(b"A".to_vec(), b"b".to_vec())], ..Exec::user(["sh", "-c", "exit 7"]) };
    keep("call_socket", "call", Message::Call(Box::new(exec.clone())).encode().unwrap());
    keep("call_socket", "start", Message::Start(Box::new(exec)).encode().unwrap());
    keep("call_socket", "pause", Message::Control(Control::Pause).encode().unwrap());
    for (name, answer) in [
        ("exited", Answer::Exited(Exit::Code(7))),
        ("refused", Answer::Refused { reason: "it is paused".into() }),
        ("status", Answer::Status(Default::default())),
    ] {
        keep("call_socket", name, serde_json::to_vec(&answer).unwrap());
    }
    let line = CommandLine::parse(b"DEFAULT:QUBESRPC qubes.VMShell dom0").unwrap();
    keep("call_socket", "line", Message::Line(line).encode().unwrap());
    keep("call_socket", "serve", serde_json::to_vec(&Answer::Serve { domain: 7 }).unwrap());
    let endpoint = |domain| Endpoint { domain, port: 513 };
    let request = RequestId::new("SOCKET7").unwrap();
    let trigger = |service: &[u8], source: &[u8]| {
        FromAgent::Trigger(Trigger {
            service: service.to_vec(),
            target: b"@dispvm".to_vec(),
            source: source.to_vec(),
            request: request.clone(),
        })
    };
    for version in [Version::V2, Version::V3, Version::V4] {
        let mut bytes = vec![200];
        version.encode_hello(&mut bytes);
        let ends =
            [FromAgent::ConnectionTerminated(endpoint(0)), FromAgent::ConnectionTerminated(endpoint(4))];
        for message in [trigger(b"qubes.OpenURL", b""), trigger(b"../x", b"")].iter().chain(&ends) {
            message.encode(version, &mut bytes).unwrap();
        }
        keep("call_control", &format!("v{}", version.number()), bytes);
    }
    let orders = [
        ToAgent::ExecCmdline(endpoint(0), b"DEFAULT:QUBESRPC qubes.VMShell dom0".to_vec()),
        ToAgent::JustExec(endpoint(4), b"root:true".to_vec()),
        ToAgent::ServiceConnect(endpoint(0), request.clone()),
        ToAgent::ServiceRefused(request.clone()),
    ];
    let mut bytes = vec![7];
    Version::V3.encode_hello(&mut bytes);
    orders.iter().for_each(|order| order.encode(&mut bytes).unwrap());
    keep("agent_control", "orders", bytes);
    let mut bytes = vec![3];
    Version::V4.encode_hello(&mut bytes);
    trigger(b"qubes.OpenURL", b"work").encode(Version::V4, &mut bytes).unwrap();
    keep("call_control", "source", bytes);
    keep(
        "agent_call",
        "call",
        Call::parse(b"@dispvm:debian-dvm", b"qubes.StartApp+firefox").unwrap().encode(),
    );
    keep("agent_call", "nobody", b"\0qubes.Filecopy\0");
    keep("agent_call", "exited", [3, 7]);
    keep("agent_call", "problem", b"\x04the host is gone");
    keep("call_line", "rpc", "DEFAULT:nogui:QUBESRPC qubes.StartApp+firefox work name vault");
    keep("call_line", "keyword", "root:QUBESRPC qubes.VMShell dom0 keyword dispvm:debian-dvm");
    keep("call_line", "shell", "user:nogui:id -u; exit");
}
