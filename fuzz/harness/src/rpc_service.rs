//! What the files of a service say: its configuration, and the place that a link and a caller's argument name.

use std::path::Path;

use ::rpc_service::config::Config;
use ::rpc_service::tcp;

use crate::take;

/// A configuration; or, with an odd first byte, a link's target, a NUL, and an argument.
pub fn files(data: &[u8]) {
    let mut data = data;
    let [kind] = take::<1>(&mut data);
    if kind & 1 == 0 {
        if let Err(error) = Config::parse(data) {
            let lines = 1 + data.iter().filter(|byte| **byte == b'\n').count();
            assert!((1..=lines).contains(&error.line), "{error}");
        }
        return;
    }
    let text = String::from_utf8_lossy(data);
    let (link, argument) = text.split_once('\0').unwrap_or((&text, ""));
    if let Ok(Some(place)) = tcp::of_link(Path::new(link), argument) {
        assert!(link.starts_with("/dev/tcp") && place.address.port() != 0);
        let again = format!(
            "/dev/tcp/{}/{}",
            place
                .to_string()
                .trim_start_matches('[')
                .rsplit_once(':')
                .map_or("", |(host, _)| host.trim_end_matches(']')),
            place.address.port()
        );
        assert_eq!(tcp::of_link(Path::new(&again), "").ok().flatten(), Some(place), "{again}");
    }
}
