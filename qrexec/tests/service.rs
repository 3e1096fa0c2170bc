//! Names and command lines, as they stand in Qubes and as an attacker would have them.

use proptest::prelude::*;
use qrexec::service::*;

#[test]
fn names_that_could_leave_their_folder_are_refused() {
    for bad in ["", "+a", "..", ".", ".a", "-a", "a/b", "../a", "a\0", "a b", "a\n", "ä", "a+b/c", "a@b"] {
        assert!(Service::parse(bad.as_bytes()).is_err(), "{bad:?}");
    }
    assert!(Service::parse("a".repeat(256).as_bytes()).is_err());
    assert!(Service::parse(format!("a+{}", "b".repeat(64_998)).as_bytes()).is_err());
    assert!(Service::parse(format!("a+{}", "b".repeat(64_997)).as_bytes()).is_ok());
    let service = Service::parse(b"qubes.VMExec+cd+..").unwrap();
    assert_eq!((service.name(), service.argument()), ("qubes.VMExec", Some("cd+..")));

    for bad in ["", "-a", "1a", "a.b", "a/b", "a\0", "..", "a+b", "@a"] {
        assert!(QubeName::parse(bad.as_bytes()).is_err(), "{bad:?}");
    }
    assert!(QubeName::parse(&[b'a'; 31]).is_ok() && QubeName::parse(&[b'a'; 32]).is_err());
}

#[test]
fn targets_are_names_uuids_and_keywords() {
    let said = |text: &str| Target::parse(text.as_bytes()).map(|target| target.to_string());
    for same in [
        "work",
        "dom0",
        "@dispvm",
        "@dispvm:fedora-40-dvm",
        "@adminvm",
        "uuid:01234567-89ab-cdef-0123-456789abcdef",
    ] {
        assert_eq!(said(same).as_deref(), Ok(same));
    }
    assert_eq!(said("").as_deref(), Ok("@default"));
    assert_eq!(said("$dispvm").as_deref(), Ok("@dispvm"));
    for bad in
        ["@", "@-a", "uuid:", "uuid:01234567-89ab-cdef-0123-456789abcdeg", "a b", "@a b", "@a/b", "@a\0"]
    {
        assert!(said(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn command_lines_read_as_the_multiplexer_reads_them() {
    for line in [
        "user:QUBESRPC qubes.VMShell+ work",
        "DEFAULT:QUBESRPC qubes.VMExec+true dom0",
        "root:QUBESRPC a+b work keyword adminvm",
        "root:QUBESRPC a work name dom0",
        "user:nogui:xterm -e 'a: b'",
    ] {
        assert_eq!(CommandLine::parse(line.as_bytes()).unwrap().to_bytes(), line.as_bytes());
    }
    for bad in [
        "",
        "date",
        ":date",
        "-x:date",
        "a/b:date",
        "user:",
        "user:a\0b",
        "user:QUBESRPC a",
        "user:QUBESRPC  a b",
        "user:QUBESRPC a b name",
        "user:QUBESRPC a b other c",
        "user:QUBESRPC a b name c d",
        "user:nogui:QUBESRPC ../a b",
    ] {
        assert!(CommandLine::parse(bad.as_bytes()).is_err(), "{bad:?}");
    }
}

proptest! {
    #[test]
    fn an_encoded_command_is_a_services_argument(argv in prop::collection::vec(prop::collection::vec(1u8.., 1..20), 1..6)) {
        let argument = qrexec::vmexec::encode(&argv);
        let descriptor = format!("qubes.VMExec+{argument}");
        prop_assert!(Service::parse(descriptor.as_bytes()).is_ok());
    }

    #[test]
    fn any_text_is_read_without_harm(bytes in prop::collection::vec(any::<u8>(), 0..80), text in "[-+0-9A-Ga:@ ]{0,30}") {
        let line = [b"user:QUBESRPC ", &bytes[..]].concat();
        if let Ok(parsed) = CommandLine::parse(&line) {
            prop_assert_eq!(CommandLine::parse(&parsed.to_bytes()), Ok(parsed));
        }
        let _ = (Service::parse(&bytes), QubeName::parse(&bytes), Target::parse(&bytes));
        for text in [text.as_bytes(), &bytes] {
            if let Ok(target) = Target::parse(text) {
                prop_assert_eq!(Target::parse(target.to_string().as_bytes()), Ok(target));
            }
        }
    }
}
