//! LZ4 as the Linux kernel's build compresses itself: the legacy frame of `lz4 -l`, and behind it, no part of it, four bytes that
//! say how long the kernel is. The frame has no checksum; that length is all there is to check.
//!
//! Sources: "LZ4 Frame Format Description", legacy frame; "LZ4 Block Format Description" (both of the lz4 project);
//! Linux `lib/decompress_unlz4.c` for what follows the last block.

/// What a legacy frame begins with.
pub const MAGIC: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
/// The most a block of a legacy frame may become.
const BLOCK_BYTES_MAX: usize = 8 << 20;
/// A match of fewer bytes is not worth its three bytes of code: what the format adds to every length.
const MATCH_MIN: usize = 4;

/// Decompresses a legacy frame of at most `max` bytes. Error: what is wrong with it.
pub fn decompress(mut frame: &[u8], max: usize) -> Result<Vec<u8>, &'static str> {
    let mut out = Vec::new();
    take(&mut frame, MAGIC.len())
        .filter(|magic| *magic == MAGIC)
        .ok_or("it does not begin as a legacy frame")?;
    // Four bytes or fewer are no block: the size of it all, which the kernel's build appends.
    while frame.len() > 4 {
        let length = take(&mut frame, 4).and_then(|bytes| bytes.first_chunk().copied());
        let length = u32::from_le_bytes(length.ok_or("a block's length is cut off")?);
        let block = usize::try_from(length).ok().and_then(|length| take(&mut frame, length));
        let room = max.saturating_sub(out.len()).min(BLOCK_BYTES_MAX);
        decompress_block(block.ok_or("a block is cut off")?, &mut out, room)?;
    }
    match frame.first_chunk().map(|size| u32::from_le_bytes(*size)) {
        Some(size) if usize::try_from(size) != Ok(out.len()) => Err("it is not as long as it says"),
        _ => Ok(out),
    }
}

/// Appends what one block holds: at most `room` bytes. Matches do not reach back into the block before.
fn decompress_block(mut block: &[u8], out: &mut Vec<u8>, room: usize) -> Result<(), &'static str> {
    let start = out.len();
    let end = start.checked_add(room).ok_or("it is too large")?;
    loop {
        let token = usize::from(*take(&mut block, 1).and_then(<[u8]>::first).ok_or("a token is cut off")?);
        let literals = length(&mut block, token >> 4)?;
        let literals = take(&mut block, literals).ok_or("literals are cut off")?;
        if literals.len() > end - out.len() {
            return Err("it is larger than it may be");
        }
        out.extend_from_slice(literals);
        if block.is_empty() {
            return Ok(());
        }
        let distance = take(&mut block, 2).and_then(|bytes| bytes.first_chunk().copied());
        let distance = usize::from(u16::from_le_bytes(distance.ok_or("a distance is cut off")?));
        let count = length(&mut block, token & 0xf)?.checked_add(MATCH_MIN).ok_or("a length wraps")?;
        if distance == 0 || distance > out.len() - start {
            return Err("a match lies before its block");
        }
        if count > end - out.len() {
            return Err("it is larger than it may be");
        }
        repeat(out, distance, count);
    }
}

/// Appends `count` bytes, each a copy of that `distance` before it; so a short distance repeats itself.
fn repeat(out: &mut Vec<u8>, distance: usize, count: usize) {
    let from = out.len() - distance;
    let end = out.len() + count;
    while out.len() < end {
        let available = (out.len() - from).min(end - out.len());
        out.extend_from_within(from..from + available);
    }
}

/// A length: four bits of the token, and as many bytes more as are 255 and one that is not.
fn length(block: &mut &[u8], nibble: usize) -> Result<usize, &'static str> {
    let mut length = nibble;
    if nibble == 0xf {
        loop {
            let more = *take(block, 1).and_then(<[u8]>::first).ok_or("a length is cut off")?;
            length = length.checked_add(usize::from(more)).ok_or("a length wraps")?;
            if more != 0xff {
                break;
            }
        }
    }
    Ok(length)
}

/// The next `count` bytes, which are then behind us.
fn take<'a>(from: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (taken, rest) = from.split_at_checked(count)?;
    *from = rest;
    Some(taken)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(blocks: &[&[u8]]) -> Vec<u8> {
        let mut frame = MAGIC.to_vec();
        for block in blocks {
            frame.extend((block.len() as u32).to_le_bytes());
            frame.extend(*block);
        }
        frame
    }

    #[test]
    fn matches_repeat_what_they_overlap() {
        // Two literals, nine bytes from two back; then, as each block ends, literals alone.
        let block = [&[0x25, b'a', b'b', 2, 0], &[0x30, b'x', b'y', b'z'][..]].concat();
        let mut image = frame(&[&block, &block]);
        image.extend(28u32.to_le_bytes());
        assert_eq!(decompress(&image, 28).unwrap(), b"abababababaxyzabababababaxyz");
        assert_eq!(decompress(&image, 27), Err("it is larger than it may be"));
        *image.last_mut().unwrap() = 1;
        assert_eq!(decompress(&image, 28), Err("it is not as long as it says"));
    }

    #[test]
    fn matches_stay_in_their_block() {
        let far = [0x10, b'a', 2, 0, 0x10, b'b'];
        assert_eq!(
            decompress(&frame(&[&[0x20, b'a', b'b'], &far]), 100),
            Err("a match lies before its block")
        );
    }

    proptest! {
        #[test]
        fn damage_is_an_error_and_never_more_than_the_limit(noise in prop::collection::vec(any::<u8>(), 0..400)) {
            if let Ok(out) = decompress(&frame(&[&noise]), 1000) {
                prop_assert!(out.len() <= 1000);
            }
        }
    }
}
