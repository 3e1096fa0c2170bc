//! The Admin API, either side of it.

use admin_api::lines::{Property, Qube};
use admin_api::{Event, Reply, Request, EVENT_BYTES_MAX, REQUEST_BYTES_MAX};

/// The bytes as a request to the daemon; and, as it costs nothing, as what a client may be answered.
pub fn request(data: &[u8]) {
    if let Ok(request) = Request::decode(data) {
        let header = [&request.method, &request.argument, &request.source, &request.destination];
        assert!(header.iter().all(|part| part.bytes().all(|byte| byte.is_ascii_graphic())));
        assert!(!request.method.is_empty() && !request.source.is_empty() && !request.destination.is_empty());
        // What comes back may be longer by the `+` that a request need not have.
        if let Ok(bytes) = request.encode() {
            assert_eq!(Request::decode(&bytes), Ok(request));
        } else {
            assert!(data.len() + "+name".len() > REQUEST_BYTES_MAX, "what was read can be written");
        }
    }
    reply(data);
    event(data);
    lines(data);
}

fn reply(data: &[u8]) {
    let Ok(reply) = Reply::decode(data) else { return };
    if let Reply::Exception(exception) = &reply {
        exception.message();
    }
    assert_eq!(Reply::decode(&reply.encode()), Ok(reply));
}

fn event(data: &[u8]) {
    let Ok(Some((event, len))) = Event::decode(data) else { return };
    assert!(len <= data.len() && len <= EVENT_BYTES_MAX);
    assert_eq!(event.encode(), data[..len]);
}

fn lines(data: &[u8]) {
    if let Ok(qubes) = Qube::parse_all(data) {
        let text: String = qubes.iter().map(|qube| format!("{qube}\n")).collect();
        assert_eq!(Qube::parse_all(text.as_bytes()), Ok(qubes));
    }
    if let Ok(properties) = Property::decode_lines(data) {
        let text: String = properties.iter().map(|(name, property)| property.encode_line(name)).collect();
        assert_eq!(Property::decode_lines(text.as_bytes()), Ok(properties));
    }
}
