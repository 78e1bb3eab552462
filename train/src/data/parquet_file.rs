//! Documents in the rows of a Parquet file.

use std::{fs::File, ops::ControlFlow, path::Path, str};

use parquet::{
    basic::Type as PhysicalType,
    column::reader::ColumnReader,
    data_type::ByteArray,
    file::reader::{FileReader, SerializedFileReader},
};

use super::{
    error::DataError,
    formats::{Record, Sink, give, non_empty},
};

/// Rows at a time.
const ROWS: usize = 256;

/// Reads one document per row.
pub(crate) fn read(
    path: &Path,
    text_field: &str,
    sink: &mut Sink<'_>,
) -> Result<ControlFlow<()>, DataError> {
    let opened = File::open(path)
        .map_err(|error| format!("cannot be read: {error}"))
        .and_then(|file| {
            let size = file.metadata().map_or(0, |data| data.len());
            let reader = SerializedFileReader::new(file)
                .map_err(|error| format!("not a Parquet file: {error}"))?;
            Ok((reader, size))
        })
        .and_then(|(reader, size)| Ok((text_column(&reader, text_field)?, reader, size)));
    let (column, reader, size) = match opened {
        Ok(opened) => opened,
        Err(what) => return sink(Record::Problem(None, what)),
    };
    let rows = usize::try_from(reader.metadata().file_metadata().num_rows()).unwrap_or(0);
    if rows == 0 {
        return sink(Record::Problem(None, "the file is empty".to_owned()));
    }
    let mut row = 0;
    for group in 0..reader.num_row_groups() {
        let column = reader
            .get_row_group(group)
            .and_then(|g| g.get_column_reader(column));
        let mut column = match column {
            Ok(ColumnReader::ByteArrayColumnReader(column)) => column,
            other => {
                let why = other
                    .err()
                    .map_or("not text".to_owned(), |error| error.to_string());
                let what = format!("the rest cannot be read: {why}");
                return sink(Record::Problem(Some(row + 1), what));
            }
        };
        loop {
            let (mut values, mut levels) = (Vec::<ByteArray>::new(), Vec::new());
            let read = column.read_records(ROWS, Some(&mut levels), None, &mut values);
            let records = match read {
                Ok((0, ..)) => break,
                Ok((records, ..)) => records,
                Err(error) => {
                    let what = format!("the rest cannot be read: {error}");
                    return sink(Record::Problem(Some(row + 1), what));
                }
            };
            // A required column has no levels; in an optional one, level 0 is an absent value.
            let mut values = values.into_iter();
            for i in 0..records {
                let present = levels.get(i).is_none_or(|&level| level > 0);
                row += 1;
                let text = match values.by_ref().take(usize::from(present)).next() {
                    Some(value) => utf8(value.data()).and_then(non_empty),
                    None => Err(format!("no value in column {text_field:?}")),
                };
                give!(
                    sink,
                    match text {
                        Ok(text) => Record::Text(text),
                        Err(what) => Record::Problem(Some(row), what),
                    }
                );
            }
            let done = |row: usize| (u128::from(size) * row as u128 / rows.max(row) as u128) as u64;
            give!(sink, Record::Read(done(row) - done(row - records)));
        }
    }
    Ok(ControlFlow::Continue(()))
}

/// The index of the column that holds the text: a flat one, optional at most at its top.
fn text_column(reader: &SerializedFileReader<File>, name: &str) -> Result<usize, String> {
    let columns = reader.metadata().file_metadata().schema_descr().columns();
    let found = columns
        .iter()
        .position(|column| column.path().string() == name);
    let index = found.ok_or_else(|| format!("no column {name:?}"))?;
    let column = &columns[index];
    let flat = column.max_rep_level() == 0 && column.max_def_level() <= 1;
    if flat && column.physical_type() == PhysicalType::BYTE_ARRAY {
        Ok(index)
    } else {
        Err(format!("column {name:?} does not hold text"))
    }
}

fn utf8(bytes: &[u8]) -> Result<String, String> {
    let text = str::from_utf8(bytes);
    text.map(str::to_owned)
        .map_err(|e| format!("not UTF-8 from byte {} on", e.valid_up_to()))
}

#[cfg(test)]
mod tests {
    use std::{fs, sync::Arc};

    use parquet::{
        data_type::{ByteArrayType, Int32Type},
        file::writer::SerializedFileWriter,
        schema::parser::parse_message_type,
    };

    use super::*;
    use crate::data::{config::Format, formats::tests::read_all};

    /// Writes a file with a text column, optional or required, in row groups of two rows.
    fn write_parquet(path: &Path, required: bool, rows: &[Option<&[u8]>]) {
        let kind = if required { "REQUIRED" } else { "OPTIONAL" };
        let schema = format!("message m {{ REQUIRED INT32 id; {kind} BINARY text (UTF8); }}");
        let schema = Arc::new(parse_message_type(&schema).unwrap());
        let file = File::create(path).unwrap();
        let mut writer = SerializedFileWriter::new(file, schema, Default::default()).unwrap();
        for rows in rows.chunks(2) {
            let mut group = writer.next_row_group().unwrap();
            let mut ids = group.next_column().unwrap().unwrap();
            let numbers: Vec<i32> = (0..rows.len() as i32).collect();
            ids.typed::<Int32Type>()
                .write_batch(&numbers, None, None)
                .unwrap();
            ids.close().unwrap();
            let mut texts = group.next_column().unwrap().unwrap();
            let values: Vec<ByteArray> = rows
                .iter()
                .flatten()
                .map(|bytes| bytes.to_vec().into())
                .collect();
            let levels: Vec<i16> = rows.iter().map(|row| i16::from(row.is_some())).collect();
            let levels = (!required).then_some(levels.as_slice());
            texts
                .typed::<ByteArrayType>()
                .write_batch(&values, levels, None)
                .unwrap();
            texts.close().unwrap();
            group.close().unwrap();
        }
        writer.close().unwrap();
    }

    #[test]
    fn parquet_rows_with_and_without_absent_values() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.parquet");
        let long = "wörd ".repeat(100);
        // The absent value comes before another one of its row group: it must not take that one's place.
        let rows: [Option<&[u8]>; 5] = [
            None,
            Some(b"one"),
            Some(b"\xff"),
            Some(b""),
            Some(long.as_bytes()),
        ];
        write_parquet(&path, false, &rows);
        let (texts, problems, read) = read_all(&path, Format::Parquet);
        assert_eq!(texts, ["one", &long]);
        let expected = [
            (Some(1), "no value in column \"text\""),
            (Some(3), "not UTF-8 from byte 0 on"),
            (Some(4), "the document is empty"),
        ];
        assert_eq!(problems, expected.map(|(row, what)| (row, what.to_owned())));
        assert_eq!(read, fs::metadata(&path).unwrap().len());

        write_parquet(&path, true, &[Some(b"a"), Some(b"b"), Some(b"c")]);
        let (texts, problems, _) = read_all(&path, Format::Parquet);
        assert_eq!(texts.concat(), "abc");
        assert!(problems.is_empty(), "{problems:?}");
    }

    #[test]
    fn what_is_not_parquet_is_a_problem() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.parquet");
        fs::write(&path, "PAR1 but not really PAR1").unwrap();
        assert!(
            read_all(&path, Format::Parquet).1[0]
                .1
                .starts_with("not a Parquet file")
        );
        write_parquet(&path, true, &[Some(b"a")]);
        let mut sink = |record| {
            assert!(matches!(record, Record::Problem(None, what) if what == "no column \"body\""));
            Ok(ControlFlow::Continue(()))
        };
        let _ = read(&path, "body", &mut sink).unwrap();
    }
}
