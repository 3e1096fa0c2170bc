use std::sync::Arc;
use std::thread;

use super::super::nodes::Node;
use super::super::simulated::Simulated;
use super::super::wire::{Access, Perm};
use super::*;
use crate::hypercalls::DomId;

#[test]
fn nodes_are_written_read_listed_and_removed() {
    let simulated = Simulated::new();
    let store = simulated.connect();
    let nodes: Vec<Node> = (0..100).map(|n| Node::new(format!("/a/b/{n}"), n)).collect();
    store.write_all(&nodes).unwrap();
    assert_eq!(store.read("/a/b/77").unwrap().as_deref(), Some("77"));
    assert_eq!(store.list("/a/b").unwrap().len(), 100);
    store.set_perms("/a/b", &[Perm::new(0, Access::None), Perm::new(7, Access::Read)]).unwrap();
    assert_eq!(store.perms("/a/b").unwrap().len(), 2);
    store.rm("/a").unwrap();
    store.rm("/a/b").unwrap();
    assert_eq!(store.read("/a/b/77").unwrap(), None);
    assert_eq!(store.list("/a").unwrap(), Vec::<String>::new());
    let refused = store.set_perms("/gone", &[]).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "cannot set the permissions of /gone in xenstore: ENOENT: No such file or directory"
    );
}

#[test]
fn a_transaction_is_tried_again_and_not_for_ever() {
    let simulated = Simulated::new();
    let store = simulated.connect();
    simulated.fail_commits(3);
    let mut runs = 0;
    let count = |runs: &mut u32| {
        store.transaction("count", |tx| {
            *runs += 1;
            tx.write("/count", &runs.to_string())
        })
    };
    count(&mut runs).unwrap();
    assert_eq!((runs, simulated.get("/count").as_deref()), (4, Some("4")));
    simulated.fail_commits(u32::MAX);
    assert!(matches!(count(&mut runs), Err(XenstoreError::Contended { what: "count" })));
    assert_eq!(simulated.get("/count").as_deref(), Some("4"));
}

#[test]
fn an_error_in_a_transaction_undoes_it() {
    let simulated = Simulated::new();
    let store = simulated.connect();
    let result: Result<()> = store.transaction("fail", |tx| {
        tx.write("/half", "done")?;
        tx.perms("/absent").map(drop)
    });
    assert!(result.unwrap_err().is(Errno::ENOENT));
    assert_eq!(simulated.get("/half"), None);
}

#[test]
fn a_failure_at_any_request_is_an_error_and_the_connection_goes_on() {
    for at in 0..4 {
        let simulated = Simulated::new();
        let store = simulated.connect();
        simulated.fail_at(at, Errno::EIO);
        let nodes: Vec<Node> = (0..4).map(|n| Node::new(format!("/n/{n}"), n)).collect();
        assert!(store.write_all(&nodes).unwrap_err().is(Errno::EIO));
        store.write("/after", "1").unwrap();
        assert_eq!(simulated.get("/after").as_deref(), Some("1"));
    }
}

#[test]
fn waiting_ends_with_the_value_or_the_time() {
    let simulated = Simulated::new();
    let store = Arc::new(simulated.connect());
    store.watch("/other", "mine").unwrap();
    let late = simulated.clone();
    let writer = thread::spawn(move || {
        thread::sleep(Duration::from_millis(20));
        late.set("/other/x", "1");
        late.set("/state", "4");
    });
    let limit = Duration::from_secs(10);
    let state = store.wait_for("/state", "4", limit, |value| (value == Some("4")).then_some(4)).unwrap();
    assert_eq!(state, 4);
    writer.join().unwrap();
    // What came for others meanwhile is still there: the first event of a watch and the change.
    let paths: Vec<String> =
        std::iter::from_fn(|| store.next_event().unwrap()).map(|event| event.path).collect();
    assert_eq!(paths, ["/other", "/other/x"]);
    let limit = Duration::from_millis(30);
    let late = store.wait_for("/state", "5", limit, |value| (value == Some("5")).then_some(()));
    assert!(matches!(late, Err(XenstoreError::Timeout { wanted: "5", .. })));
}

#[test]
fn threads_share_a_connection() {
    let simulated = Simulated::new();
    let store = simulated.connect();
    thread::scope(|scope| {
        for thread in 0..4 {
            let store = &store;
            scope.spawn(move || {
                for n in 0..50 {
                    let path = format!("/t/{thread}/{n}");
                    store.write(&path, &path).unwrap();
                    assert_eq!(store.read(&path).unwrap(), Some(path));
                }
            });
        }
    });
}

#[test]
fn a_connection_that_answers_nonsense_is_given_up() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let store = Xenstore::over(ours);
    theirs.write_all(&[0xff; 64]).unwrap();
    assert!(matches!(store.read("/a"), Err(XenstoreError::Wire { .. })));
    assert!(matches!(store.read("/a"), Err(XenstoreError::Io { .. })));
}

#[test]
fn guests_are_bound_by_permissions() {
    let simulated = Simulated::new();
    let dom0 = simulated.connect();
    let guest = simulated.connect_as(DomId(7));
    let readable = [Perm::new(0, Access::None), Perm::new(7, Access::Read)];
    let home = Node::new("/local/domain/7", "").with(&readable);
    let data = Node::new("/local/domain/7/data", "").with(&[Perm::new(7, Access::None)]);
    dom0.write_all(&[home, Node::new("/local/domain/7/name", "g"), data]).unwrap();
    assert_eq!(guest.read("name").unwrap().as_deref(), Some("g"));
    assert!(guest.write("name", "other").unwrap_err().is(Errno::EACCES));
    assert!(guest.read("/local/domain/0/domid").unwrap_err().is(Errno::EACCES));
    guest.write("data/x", "1").unwrap();
    assert_eq!(dom0.read("/local/domain/7/data/x").unwrap().as_deref(), Some("1"));
}
