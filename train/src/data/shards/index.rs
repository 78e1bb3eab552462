//! The `.idx` file.

use super::Width;

const MAGIC: &[u8; 9] = b"MMIDIDX\0\0";
const VERSION: u64 = 1;
/// Magic, version, token type, and the two counts.
const HEADER: usize = 9 + 8 + 1 + 8 + 8;

/// The index of documents of these lengths, one after the other.
pub(super) fn encode(width: Width, lengths: &[i32]) -> Vec<u8> {
    let mut index = Vec::with_capacity(HEADER + 20 * lengths.len() + 8);
    let count = lengths.len() as u64;
    index.extend(MAGIC);
    index.extend(VERSION.to_le_bytes());
    index.push(width.code());
    index.extend(count.to_le_bytes());
    index.extend((count + 1).to_le_bytes());
    lengths
        .iter()
        .for_each(|length| index.extend(length.to_le_bytes()));
    let mut offset = 0;
    for &length in lengths {
        index.extend(i64::to_le_bytes(offset));
        offset += i64::from(length) * width.bytes() as i64;
    }
    (0..=count).for_each(|document| index.extend(document.to_le_bytes()));
    index
}

/// A document's length in tokens, in an index that was checked.
pub(super) fn length(index: &[u8], document: usize) -> usize {
    i32::from_le_bytes(array(index, HEADER + 4 * document)) as usize
}

/// A document's place in the `.bin`, in an index of `len` documents that was checked.
pub(super) fn offset(index: &[u8], len: usize, document: usize) -> usize {
    u64::from_le_bytes(array(index, HEADER + 4 * len + 8 * document)) as usize
}

pub(super) fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N]
        .try_into()
        .expect("a slice of N bytes is an array of N bytes")
}

/// A field of the index that is not as it must be.
pub(super) struct Wrong {
    pub(super) field: String,
    pub(super) found: String,
    pub(super) expected: String,
}

/// Checks an index against itself and the length of its `.bin`.
pub(super) fn check(idx: &[u8], bin_bytes: u64) -> Result<(Width, usize), Wrong> {
    let field = |field: String, found: String, expected: String| Wrong {
        field,
        found,
        expected,
    };
    let require = |holds: bool, name: &str, found: String, expected: String| match holds {
        true => Ok(()),
        false => Err(field(name.to_owned(), found, expected)),
    };
    let size = idx.len();
    require(
        size >= HEADER,
        "size",
        format!("{size} bytes"),
        format!("at least {HEADER}"),
    )?;
    let magic = idx[..9].escape_ascii().to_string();
    require(
        idx.starts_with(MAGIC),
        "magic",
        magic,
        MAGIC.escape_ascii().to_string(),
    )?;
    let version = u64::from_le_bytes(array(idx, 9));
    require(
        version == VERSION,
        "version",
        version.to_string(),
        VERSION.to_string(),
    )?;
    let width = match idx[17] {
        8 => Width::U16,
        4 => Width::I32,
        code => {
            return Err(field(
                "token type".into(),
                code.to_string(),
                "8 or 4".into(),
            ));
        }
    };
    let len = u64::from_le_bytes(array(idx, 18));
    let boundaries = u64::from_le_bytes(array(idx, 26));
    let expected = len
        .checked_add(1)
        .map_or("less".to_owned(), |n| n.to_string());
    let one_each = boundaries == len.wrapping_add(1);
    require(
        one_each,
        "number of document boundaries",
        boundaries.to_string(),
        expected,
    )?;
    // In 128 bits no count overflows.
    let needed = HEADER as u128 + 12 * u128::from(len) + 8 * u128::from(boundaries);
    require(
        needed == size as u128,
        "size",
        format!("{size} bytes"),
        needed.to_string(),
    )?;

    let len = len as usize;
    let mut offset = 0u64;
    for i in 0..len {
        let length = i32::from_le_bytes(array(idx, HEADER + 4 * i));
        let name = format!("length of document {i}");
        let length = u64::try_from(length)
            .map_err(|_| field(name, length.to_string(), "not negative".to_owned()))?;
        let found = u64::from_le_bytes(array(idx, HEADER + 4 * len + 8 * i));
        require(
            found == offset,
            &format!("offset of document {i}"),
            found.to_string(),
            offset.to_string(),
        )?;
        offset += length * width.bytes() as u64;
    }
    for i in 0..=len {
        let found = u64::from_le_bytes(array(idx, HEADER + 12 * len + 8 * i));
        let name = format!("document boundary {i}");
        require(found == i as u64, &name, found.to_string(), i.to_string())?;
    }
    require(
        offset == bin_bytes,
        "size of the .bin",
        format!("{bin_bytes} bytes"),
        offset.to_string(),
    )?;
    Ok((width, len))
}
