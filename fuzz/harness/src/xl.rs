//! `xl save` files, and what of a Xen guest goes into a savefile.

use xen_glue::device_state::DeviceState;
use xen_glue::stream::config::GuestConfig;
use xen_glue::stream::import::{fill, survey, ImportError};
use xen_glue::stream::reader::{Item, StreamReader};
use xen_glue::stream::writer::StreamWriter;
use xen_glue::stream::xl_header::ConfigText;
use xen_glue::stream::{export, StreamError};

use crate::files;

/// A guest of at most so many pages is written again.
const PAGES_MAX: u64 = 1024;

/// A file that should be a saved guest: read, written again, taken over.
pub fn stream(data: &[u8]) {
    match items(data) {
        Ok((config, items)) => same_again(data, config, items),
        Err(error) => return assert!(error.offset <= data.len() as u64, "{error}"),
    }
    let guest = match survey(data) {
        Ok(guest) => guest,
        Err(ImportError::Refused(_) | ImportError::Stream(_)) => return,
        Err(error) => panic!("a survey writes nothing: {error}"),
    };
    let memory = files::empty();
    let filled = fill(data, &guest, &memory).expect("what was surveyed can be filled in");
    assert!(filled.data_pages <= data.len() as u64 >> 12, "pages out of nothing");
    assert_eq!(DeviceState::parse(&guest.state.to_bytes()).as_ref(), Ok(&guest.state));
    if guest.state.layout.pages().0 > PAGES_MAX {
        return;
    }
    let written = export::write(Vec::new(), &guest.config, &guest.state, &memory).expect("room for a guest");
    assert_eq!(survey(&written[..]).expect("what was written is a guest").state, guest.state);
}

type Items = Vec<(Item, Option<Box<[u8; 4096]>>)>;

fn items(data: &[u8]) -> Result<(ConfigText, Items), StreamError> {
    let mut stream = StreamReader::new(data)?;
    let mut items = Vec::new();
    while let Some(item) = stream.next_item()? {
        let has_data = matches!(&item, Item::Page(entry) if entry.kind.has_data());
        items.push((item, has_data.then(|| Box::new(*stream.page()))));
    }
    assert!(stream.offset() <= data.len() as u64);
    Ok((stream.config().clone(), items))
}

/// What is read of a stream, written, is read as the same.
fn same_again(data: &[u8], config: ConfigText, mut items: Items) {
    items.retain(|(item, _)| {
        matches!(item, Item::Domain(_) | Item::Page(_) | Item::Record(_) | Item::DomainEnd)
    });
    let domain = items.iter().find_map(|(item, _)| match item {
        Item::Domain(domain) => Some(*domain),
        _ => None,
    });
    let domain = domain.expect("a stream has a domain");
    let mut writer = StreamWriter::new(Vec::new(), &config, &domain).expect("it was read");
    for (item, page) in &items {
        match item {
            Item::Page(entry) => writer.page(*entry, page.as_deref().unwrap_or(&[0; 4096])),
            Item::Record(record) => writer.record(record),
            _ => Ok(()),
        }
        .expect("room for a stream");
    }
    let bytes = writer.end().expect("room for a stream");
    assert!(bytes.len() <= data.len() + 16 * items.len() + 64, "longer than what it came from");
    assert!(self::items(&bytes).expect("what was written is a stream") == (config, items));
}

/// A configuration.
pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(config) = GuestConfig::parse(&ConfigText::Json(text.to_owned())) else { return };
    if (1..=128).contains(&config.vcpus) {
        assert_eq!(
            GuestConfig::parse(&config.to_text()).expect("what was written is a configuration"),
            config
        );
    }
}

/// A Xen guest's part of a savefile.
pub fn device_state(data: &[u8]) {
    let Ok(state) = DeviceState::parse(data) else { return };
    let bytes = state.to_bytes();
    assert!(bytes.len() <= data.len(), "longer than what it came from");
    assert_eq!(DeviceState::parse(&bytes), Ok(state));
}
