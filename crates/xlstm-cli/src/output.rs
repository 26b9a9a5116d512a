//! Writing to stdout and stderr without panics.

use std::io::{self, Write};

use xlstm::{Error, ErrorKind, Result};

/// Writes data to stdout and flushes it. A reader that has gone away (`xlstm … | head`) ends the
/// program quietly: there is nobody left to write for.
///
/// # Errors
/// An input/output error, for instance a full disk behind a redirection.
pub fn data(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        Err(error) => Err(Error::new(ErrorKind::Io, format!("cannot write to stdout: {error}"))),
        Ok(()) => Ok(()),
    }
}

/// Writes one line for people to stderr. If even that fails there is nowhere to say so.
pub fn note(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}
