//! Parquet: a row a document, or a row a line of WikiText.
//!
//! One column is read, a few rows at a time, by the column reader: neither Arrow nor the other
//! columns are touched, and memory does not grow with the file.

use std::collections::VecDeque;
use std::fs::File;
use std::path::{Path, PathBuf};

use ::parquet::basic::Type;
use ::parquet::column::reader::{ColumnReaderImpl, get_typed_column_reader};
use ::parquet::data_type::{ByteArray, ByteArrayType};
use ::parquet::errors::ParquetError;
use ::parquet::file::reader::{FileReader, SerializedFileReader};

use super::documents::{Cutter, Opening, Piece, Place, Reader, Skipped, TextOptions};
use super::jsonl::no_field;
use super::wikitext::{Lines, WikiTextReader, are_lines};
use crate::{Error, Result};

/// Rows that are decoded at a time.
const ROWS: usize = 64;

/// Opens a file whose rows are documents or lines, whichever they look like.
pub(super) fn open(opening: Opening) -> Result<Box<dyn Reader>> {
    let mut first = Rows::open(&opening.source.path, &opening.options.field, 0)?;
    first.decode()?;
    let texts = first.decoded.iter().map(|row| row.as_ref().map_or("", |text| text.as_str()));
    let lines = are_lines(texts);
    let rows = Rows::open(&opening.source.path, &opening.options.field, opening.place.position)?;
    if lines {
        return Ok(Box::new(WikiTextReader::of(Box::new(RowLines(rows)), &opening)));
    }
    Ok(Box::new(ParquetReader {
        rows,
        number: opening.number,
        options: opening.options.clone(),
        cutter: opening.cutter.clone(),
    }))
}

/// A column of text, row by row.
struct Rows {
    path: PathBuf,
    file: SerializedFileReader<File>,
    column: usize,
    /// The highest definition level, at which a value is there; 0 for a column without nulls.
    defined: i16,
    /// The next row group to open.
    group: usize,
    reader: Option<ColumnReaderImpl<ByteArrayType>>,
    /// Rows before the next one.
    row: u64,
    total: u64,
    /// Rows that are decoded but have not left; an empty text for null.
    decoded: VecDeque<Result<String>>,
}

impl Rows {
    /// The column `field` of the file at `path`, from row `skip` on.
    fn open(path: &Path, field: &str, skip: u64) -> Result<Rows> {
        let file = File::open(path).map_err(|e| Error::io("read", path, &e))?;
        let file = SerializedFileReader::new(file).map_err(|e| {
            Error::data(format!("{} is not a whole Parquet file: {}", path.display(), plain(&e)))
                .hint("check that the download of the file was complete")
        })?;
        let schema = file.metadata().file_metadata().schema_descr_ptr();
        let here = path.display().to_string();
        let names: Vec<String> = schema.columns().iter().map(|column| column.path().string()).collect();
        let texts: Vec<&str> = schema
            .columns()
            .iter()
            .zip(&names)
            .filter(|(column, _)| column.physical_type() == Type::BYTE_ARRAY && column.max_rep_level() == 0)
            .map(|(_, name)| name.as_str())
            .collect();
        let Some(column) = names.iter().position(|name| name == field) else {
            let all: Vec<&str> = names.iter().map(String::as_str).collect();
            return Err(no_field("column", &here, field, if texts.is_empty() { &all } else { &texts }));
        };
        if !texts.contains(&field) {
            let kind = schema.column(column).physical_type();
            return Err(Error::data(format!(
                "{here}: expected text in the column \"{field}\", found {kind}"
            ))
            .hint(format!("columns of text in this file: {}", texts.join(", "))));
        }
        let mut rows = Rows {
            path: path.to_owned(),
            column,
            defined: schema.column(column).max_def_level(),
            group: 0,
            reader: None,
            row: 0,
            total: file.metadata().file_metadata().num_rows().max(0) as u64,
            decoded: VecDeque::new(),
            file,
        };
        rows.skip(skip)?;
        Ok(rows)
    }

    fn damaged(&self, error: &ParquetError) -> Error {
        Error::data(format!(
            "{} is damaged in row group {}, after row {}: {}",
            self.path.display(),
            self.group,
            self.row,
            plain(error)
        ))
        .hint("fetch the file again")
    }

    /// Opens the next row group; false when there is none.
    fn next_group(&mut self) -> Result<bool> {
        if self.group >= self.file.num_row_groups() {
            return Ok(false);
        }
        let group = self.file.get_row_group(self.group);
        let column = group.and_then(|group| group.get_column_reader(self.column));
        self.group += 1;
        self.reader = Some(get_typed_column_reader(column.map_err(|e| self.damaged(&e))?));
        Ok(true)
    }

    fn skip(&mut self, mut rows: u64) -> Result<()> {
        while rows > 0 && self.group < self.file.num_row_groups() {
            let size = self.file.metadata().row_group(self.group).num_rows().max(0) as u64;
            if size <= rows {
                self.group += 1;
                self.row += size;
                rows -= size;
                continue;
            }
            self.next_group()?;
            if let Some(reader) = &mut self.reader {
                let skipped = reader.skip_records(rows as usize);
                skipped.map_err(|e| self.damaged(&e))?;
            }
            self.row += rows;
            rows = 0;
        }
        Ok(())
    }

    /// Decodes some rows more; none at the end.
    fn decode(&mut self) -> Result<()> {
        while self.reader.is_some() || self.next_group()? {
            let Some(reader) = &mut self.reader else { break };
            let (mut levels, mut values) = (Vec::new(), Vec::<ByteArray>::new());
            let read = reader.read_records(ROWS, Some(&mut levels), None, &mut values);
            let (rows, ..) = read.map_err(|e| self.damaged(&e))?;
            if rows == 0 {
                self.reader = None;
                continue;
            }
            let mut values = values.into_iter();
            for place in 0..rows {
                let there = self.defined == 0 || levels.get(place) == Some(&self.defined);
                let value = if there { values.next() } else { None };
                let number = self.row + place as u64 + 1;
                self.decoded.push_back(self.text(value, number));
            }
            return Ok(());
        }
        Ok(())
    }

    fn text(&self, value: Option<ByteArray>, number: u64) -> Result<String> {
        let Some(value) = value else { return Ok(String::new()) };
        let text = std::str::from_utf8(value.data()).map_err(|e| {
            Error::data(format!(
                "{}, row {number}: expected UTF-8, found another byte at offset {} of the value",
                self.path.display(),
                e.valid_up_to()
            ))
        });
        text.map(str::to_owned)
    }

    fn next(&mut self) -> Result<Option<Result<String>>> {
        if self.decoded.is_empty() {
            self.decode()?;
        }
        let row = self.decoded.pop_front();
        self.row += u64::from(row.is_some());
        Ok(row)
    }

    fn share(&self) -> f64 {
        self.row as f64 / self.total.max(1) as f64
    }
}

/// The library's message without its own prefix.
fn plain(error: &ParquetError) -> String {
    let message = error.to_string();
    message.strip_prefix("Parquet error: ").unwrap_or(&message).to_owned()
}

/// Rows that are the lines of WikiText: the Hub keeps a blank line as nothing.
struct RowLines(Rows);

impl Lines for RowLines {
    fn next(&mut self) -> Result<Option<Result<String>>> {
        let row = self.0.next()?;
        Ok(row.map(|row| row.map(|line| if line.is_empty() { " \n".into() } else { line })))
    }

    fn position(&self) -> u64 {
        self.0.row
    }

    fn share(&self) -> f64 {
        self.0.share()
    }
}

/// Reads a row at a time.
struct ParquetReader {
    rows: Rows,
    number: usize,
    options: TextOptions,
    cutter: Cutter,
}

impl Reader for ParquetReader {
    fn read(&mut self, pieces: &mut Vec<Piece>, skipped: &mut Skipped) -> Result<bool> {
        let Some(row) = self.rows.next()? else { return Ok(false) };
        match row {
            Ok(text) => {
                let origin = (self.number, self.rows.row);
                let piece = Piece { text, begins: true, counts: None, origin };
                self.cutter.push(piece, &self.options.document_end, pieces);
            }
            Err(error) => skipped.bad(error, &self.options)?,
        }
        Ok(true)
    }

    fn place(&self) -> Place {
        Place { position: self.rows.row, lines: 0, within: false }
    }

    fn share(&self) -> f64 {
        self.rows.share()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use ::parquet::data_type::Int64Type;
    use ::parquet::file::properties::WriterProperties;
    use ::parquet::file::writer::SerializedFileWriter;
    use ::parquet::schema::parser::parse_message_type;

    use super::super::{Corpus, Source, Split};
    use super::*;
    use crate::files::tests::Scratch;
    use crate::text::Tokenizer;

    /// Writes `groups` of rows to `path`; None is null.
    fn write(path: &Path, groups: &[&[Option<&[u8]>]]) {
        let schema =
            "message m { required int64 id; optional binary text (UTF8); optional binary title (UTF8); }";
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let properties = Arc::new(WriterProperties::builder().build());
        let mut writer = SerializedFileWriter::new(File::create(path).unwrap(), schema, properties).unwrap();
        for rows in groups {
            let mut group = writer.next_row_group().unwrap();
            let mut column = group.next_column().unwrap().unwrap();
            let ids: Vec<i64> = (0..rows.len() as i64).collect();
            column.typed::<Int64Type>().write_batch(&ids, None, None).unwrap();
            column.close().unwrap();
            let levels: Vec<i16> = rows.iter().map(|row| row.is_some().into()).collect();
            let values: Vec<ByteArray> = rows.iter().flatten().map(|row| row.to_vec().into()).collect();
            for values in [&values, &vec![ByteArray::from("T"); values.len()]] {
                let mut column = group.next_column().unwrap().unwrap();
                column.typed::<ByteArrayType>().write_batch(values, Some(&levels), None).unwrap();
                column.close().unwrap();
            }
            group.close().unwrap();
        }
        writer.close().unwrap();
    }

    fn read(path: &Path, options: &TextOptions) -> Result<(String, Corpus)> {
        let sources = Source::find(&[path.to_owned()], Split::Train)?;
        let corpus = Corpus::read(&sources, options, &Tokenizer::bytes(), &mut |_| {})?;
        let mut ids = Vec::new();
        corpus.tokens(0..corpus.len(), &mut ids);
        Ok((Tokenizer::bytes().decode(&ids)?, corpus))
    }

    #[test]
    fn a_row_is_a_document() {
        let scratch = Scratch::new();
        let path = scratch.0.join("a.parquet");
        let rows: Vec<String> = (0..200).map(|row| format!("row {row} ")).collect();
        let rows: Vec<Option<&[u8]>> = rows.iter().map(|row| Some(row.as_bytes())).collect();
        write(&path, &[&rows[..100], &[None], &rows[100..]]);
        let (text, corpus) = read(&path, &TextOptions::default()).unwrap();
        assert!(text.starts_with("row 0 row 1 ") && text.ends_with("row 199 "), "{text}");
        assert_eq!((corpus.document_count(), corpus.words()), (200, 400));
        for skip in [0, 1, 99, 100, 101, 102, 200, 201] {
            let mut column = Rows::open(&path, "text", skip).unwrap();
            let mut read = Vec::new();
            while let Some(row) = column.next().unwrap() {
                read.push(row.unwrap());
            }
            assert_eq!(read.len() as u64, 201 - skip);
            assert_eq!(column.row, 201);
            if skip < 100 {
                assert_eq!(read[0], format!("row {skip} "));
            }
        }
    }

    #[test]
    fn unusable_files_are_named() {
        let scratch = Scratch::new();
        let path = scratch.0.join("a.parquet");
        write(&path, &[&[Some(b"good"), Some(b"caf\xE9"), Some(b"end")]]);
        let field = |field: &str| TextOptions { field: field.into(), ..TextOptions::default() };
        let message = |options: &TextOptions| read(&path, options).unwrap_err().to_string();
        assert!(message(&field("txt")).contains("there is no column \"txt\"; there are: text, title"));
        assert!(message(&field("id")).contains("expected text in the column \"id\", found INT64"));
        assert!(message(&field("text")).contains("a.parquet, row 2: expected UTF-8"));
        let skipping = TextOptions { skip_bad: true, ..TextOptions::default() };
        let (text, corpus) = read(&path, &skipping).unwrap();
        assert_eq!((text.as_str(), corpus.skipped().count), ("goodend", 1));

        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 20]).unwrap();
        assert!(message(&field("text")).contains("a.parquet is not a whole Parquet file"));
        let mut damaged = bytes.clone();
        let text = bytes.windows(4).position(|bytes| bytes == b"good").unwrap();
        damaged[text - 40..text + 10].fill(0xFF);
        std::fs::write(&path, &damaged).unwrap();
        let error = message(&field("text"));
        assert!(error.contains("a.parquet is damaged in row group 1, after row 0"), "{error}");
    }

    #[test]
    fn rows_of_wikitext_are_lines() {
        let scratch = Scratch::new();
        let first = scratch.0.join("train-00000-of-00002.parquet");
        let second = scratch.0.join("train-00001-of-00002.parquet");
        write(&first, &[&[None, Some(b" = A = \n"), Some(b""), Some(b" One . \n"), Some(b"")]]);
        let rest: [Option<&[u8]>; 6] =
            [Some(b" = = S = = \n"), Some(b""), Some(b" = B = \n"), Some(b""), Some(b" Two . \n"), None];
        write(&second, &[&rest]);
        let (text, corpus) = read(&scratch.0, &TextOptions::default()).unwrap();
        assert_eq!(text, " \n = A = \n \n One . \n \n = = S = = \n \n = B = \n \n Two . \n \n");
        let starts: Vec<usize> = corpus.starts_within(0..=corpus.len() - 1).collect();
        assert_eq!((starts.len(), &text[starts[1]..starts[1] + 6]), (2, " = B ="));
        // Words by white space, and eleven ends of lines.
        assert_eq!(corpus.words(), 15 + 11);
    }
}
