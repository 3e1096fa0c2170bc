//! The client against a server on a real socket.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use admin_api::client::{call, call_within, events};
use admin_api::{ApiError, Event, Exception, Kind, Reply, Request};

/// A server for one connection: it reads a request, and does `with` it.
fn serve(
    with: impl FnOnce(Request, UnixStream) + Send + 'static,
) -> (tempfile::TempDir, PathBuf, JoinHandle<()>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qubesd.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let server = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let request = Request::read(&stream).unwrap().unwrap();
        with(request, stream);
    });
    (folder, path, server)
}

#[test]
fn a_call_is_carried_out() {
    let sent = Request::new("admin.vm.property.Set", "work").argument("netvm").payload("sys-net");
    let expected = sent.clone();
    let (_folder, path, server) = serve(move |request, mut stream| {
        assert_eq!(request, expected);
        for byte in Reply::Ok(b"fine".to_vec()).encode() {
            stream.write_all(&[byte]).unwrap();
        }
    });
    assert_eq!(call(&path, &sent).unwrap(), b"fine");
    server.join().unwrap();
}

#[test]
fn an_exception_comes_as_one() {
    let (_folder, path, _server) = serve(|_, mut stream| {
        let gone = Exception::new(Kind::VmNotFound, "No such domain: 'x'");
        stream.write_all(&Reply::Exception(gone).encode()).unwrap();
    });
    let error = call(&path, &Request::new("admin.vm.Start", "x")).unwrap_err();
    assert_eq!(error.exception().unwrap().kind, Kind::VmNotFound);
    assert_eq!(error.to_string(), "No such domain: 'x'");
}

#[test]
fn a_server_that_hangs_up_has_refused() {
    let (_folder, path, _server) = serve(|_, stream| stream.shutdown(Shutdown::Both).unwrap());
    let error = call(&path, &Request::new("admin.vm.Start", "x")).unwrap_err();
    assert!(matches!(error, ApiError::Empty), "{error}");
}

#[test]
fn a_server_that_says_nothing_is_left() {
    let (_folder, path, server) = serve(|_, mut stream| {
        stream.read_to_end(&mut Vec::new()).ok();
        stream.write_all(b"0").unwrap();
        thread::sleep(Duration::from_millis(400));
    });
    let error =
        call_within(&path, &Request::new("admin.vm.Start", "x"), Duration::from_millis(100)).unwrap_err();
    assert_eq!(error.to_string(), "admin.vm.Start gave no answer within 100ms");
    server.join().unwrap();
}

#[test]
fn without_a_server_the_socket_is_named() {
    let error =
        call("/nonexistent/qubesd.sock".as_ref(), &Request::new("admin.vm.List", "dom0")).unwrap_err();
    assert!(error
        .to_string()
        .starts_with("Failed to connect to qubesd service: /nonexistent/qubesd.sock: No such"));
}

#[test]
fn events_come_until_the_server_closes() {
    let (_folder, path, server) = serve(|request, mut stream| {
        assert_eq!((&request.method[..], &request.destination[..]), ("admin.Events", "work"));
        let start = Event::new("work", "domain-start").detail("start_guid", "True").encode();
        let (one, two) = start.split_at(9);
        stream
            .write_all(&[Event::new("", "connection-established").encode(), one.to_vec()].concat())
            .unwrap();
        thread::sleep(Duration::from_millis(60));
        stream.write_all(two).unwrap();
    });
    let mut events = events(&path, "work").unwrap();
    assert_eq!(events.next().unwrap().unwrap().name, "connection-established");
    events.set_limit(Some(Duration::from_millis(20))).unwrap();
    assert!(matches!(events.next(), Some(Err(ApiError::TimedOut { .. }))));
    events.set_limit(None).unwrap();
    assert_eq!(events.next().unwrap().unwrap().get("start_guid"), Some("True"));
    assert!(events.next().is_none());
    server.join().unwrap();
}

#[test]
fn events_that_are_refused_end_with_why() {
    let (_folder, path, _server) = serve(|_, mut stream| {
        stream
            .write_all(&Reply::Exception(Exception::new(Kind::VmNotFound, "No such domain: 'x'")).encode())
            .unwrap();
    });
    let mut events = events(&path, "x").unwrap();
    assert!(matches!(events.next(), Some(Err(ApiError::Exception(_)))));
    assert!(events.next().is_none());
}
