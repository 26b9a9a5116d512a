//! Downloads from a Hub of our own, on this machine, that breaks off and redirects.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use xlstm::folder::download::pull;
use xlstm::folder::hub::Hub;

use crate::folders::Scratch;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const TOKEN: &str = "Bearer secret";

/// A request: method, path, and what matters of its headers.
#[derive(Clone, Debug)]
struct Request {
    method: String,
    path: String,
    host: String,
    authorization: Option<String>,
    first: Option<usize>,
}

/// The Hub, and what it was asked.
struct Server {
    port: u16,
    requests: Arc<Mutex<Vec<Request>>>,
}

/// `weights` bytes of weights; the first download of them breaks off after `cut` bytes.
fn serve(weights: Vec<u8>, cut: usize) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let requests = Arc::new(Mutex::new(Vec::new()));
    let heard = requests.clone();
    std::thread::spawn(move || {
        let mut breaks = true;
        for stream in listener.incoming().map_while(Result::ok) {
            if let Some(request) = read(&stream) {
                answer(&stream, &request, port, &weights, &mut breaks, cut);
                heard.lock().expect("requests").push(request);
            }
        }
    });
    Server { port, requests }
}

fn read(stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let first = lines.next()?;
    let mut words = first.split(' ').map(str::to_owned);
    let (method, path) = (words.next()?, words.next()?);
    let headers: HashMap<String, String> = lines
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.split_once(": ").map(|(k, v)| (k.to_lowercase(), v.to_owned())))
        .collect();
    let range = headers.get("range").and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
    Some(Request {
        method,
        path,
        host: headers.get("host").cloned().unwrap_or_default(),
        authorization: headers.get("authorization").cloned(),
        first: range,
    })
}

fn answer(
    mut stream: &TcpStream,
    request: &Request,
    port: u16,
    weights: &[u8],
    breaks: &mut bool,
    cut: usize,
) {
    let config = b"{\"model_type\": \"xlstm\"}";
    let head = request.method == "HEAD";
    let mut send = |status: &str, headers: &str, body: &[u8], claimed: usize| {
        let text =
            format!("HTTP/1.1 {status}\r\ncontent-length: {claimed}\r\nconnection: close\r\n{headers}\r\n");
        let _ = stream.write_all(text.as_bytes());
        let _ = stream.write_all(if head { b"" } else { body });
    };
    let files = format!("/org/name/resolve/{COMMIT}");
    if request.path.starts_with("/api/") && request.authorization.as_deref() != Some(TOKEN) {
        send("401 Unauthorized", "", b"", 0);
    } else if request.path == "/api/models/org/name/revision/main" {
        let names =
            ["config.json", "model.safetensors", "../evil.json", ".gitattributes", "pytorch_model.bin"];
        let siblings = names.map(|name| format!("{{\"rfilename\": \"{name}\"}}")).join(", ");
        let body = format!("{{\"sha\": \"{COMMIT}\", \"siblings\": [{siblings}]}}");
        send("200 OK", "", body.as_bytes(), body.len());
    } else if request.path == format!("{files}/config.json") {
        send("200 OK", "etag: W/\"c0ffee\"\r\n", config, config.len());
    } else if request.path == format!("{files}/model.safetensors") {
        // Large files lie on another host.
        let headers = format!(
            "x-linked-etag: \"beef\"\r\nx-linked-size: {}\r\nlocation: http://localhost:{port}/cdn/beef\r\n",
            weights.len()
        );
        send("302 Found", &headers, b"", 0);
    } else if request.path == "/cdn/beef" {
        match request.first {
            Some(first) => send("206 Partial Content", "", &weights[first..], weights.len() - first),
            None if *breaks => {
                *breaks = false;
                send("200 OK", "", &weights[..cut], weights.len());
            }
            None => send("200 OK", "", weights, weights.len()),
        }
    } else {
        send("404 Not Found", "", b"", 0);
    }
}

#[test]
fn a_download_that_breaks_off_goes_on() {
    let weights: Vec<u8> = (0..700_000_u32).map(|i| (i * 7 % 251) as u8).collect();
    let (server, scratch) = (serve(weights.clone(), 300_000), Scratch::new());
    let hub = Hub {
        cache: scratch.0.join("hub"),
        endpoint: format!("http://127.0.0.1:{}", server.port),
        offline: false,
        token: Some("secret".into()),
    };
    let name = "org/name".parse().expect("a name");
    let mut told = Vec::new();
    let error = pull(&hub, &name, &mut |p| told.push((p.file.to_owned(), p.done))).expect_err("breaks off");
    assert!(error.hint_text().is_some_and(|hint| hint.contains("try again")), "{error}");
    assert!(hub.cached(&name).is_none(), "half a model is none");
    let partial = scratch.0.join("hub/models--org--name/blobs/beef.incomplete");
    assert_eq!(std::fs::metadata(&partial).expect("kept").len(), 300_000);

    let folder = pull(&hub, &name, &mut |p| told.push((p.file.to_owned(), p.done))).expect("the rest");
    assert_eq!(std::fs::read(folder.join("model.safetensors")).expect("weights"), weights);
    assert_eq!(
        std::fs::read_to_string(folder.join("config.json")).expect("text"),
        "{\"model_type\": \"xlstm\"}"
    );
    assert_eq!(hub.cached(&name), Some(folder.clone()));
    assert_eq!(std::fs::read_dir(&folder).expect("files").count(), 2, "two files are a model's");
    assert!(folder.ends_with(format!("models--org--name/snapshots/{COMMIT}")) && !partial.exists());
    let evil = scratch.0.join("hub/models--org--name/snapshots/evil.json");
    assert!(!evil.exists());
    assert!(told.contains(&("model.safetensors".to_owned(), 300_000)) && told.iter().any(|t| t.1 == 700_000));
    let requests = server.requests.lock().expect("requests").clone();
    let elsewhere: Vec<&Request> = requests.iter().filter(|r| r.path.starts_with("/cdn")).collect();
    assert_eq!(elsewhere.iter().map(|r| r.first).collect::<Vec<_>>(), [None, Some(300_000)]);
    assert!(
        elsewhere.iter().all(|r| r.host.starts_with("localhost") && r.authorization.is_none()),
        "the token stays with the Hub: {elsewhere:?}"
    );

    // All there: nothing but the question which commit is meant.
    let before = requests.len();
    pull(&hub, &name, &mut |_| panic!("nothing to download")).expect("all there");
    assert_eq!(server.requests.lock().expect("requests").len(), before + 1);
}

#[test]
fn downloads_that_are_refused() {
    let (server, scratch) = (serve(Vec::new(), 0), Scratch::new());
    let hub = |offline: bool, token: Option<&str>, port: u16| Hub {
        cache: scratch.0.join("hub"),
        endpoint: format!("http://127.0.0.1:{port}"),
        offline,
        token: token.map(str::to_owned),
    };
    let closed = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").port();
    let secret = Some("secret");
    for (hub, name, wanted, hint) in [
        (hub(true, secret, server.port), "org/name", "HF_HUB_OFFLINE", "unset"),
        (hub(false, None, server.port), "org/name", "401", "HF_TOKEN"),
        (hub(false, Some("wrong"), server.port), "org/name", "401", "HF_TOKEN"),
        (hub(false, secret, server.port), "org/stranger", "404", "revision"),
        (hub(false, secret, server.port), "org/name@other", "404", "revision"),
        (hub(false, secret, closed), "org/name", "cannot download org/name@main", "try again"),
    ] {
        let error = pull(&hub, &name.parse().expect("a name"), &mut |_| {}).expect_err(wanted);
        assert!(error.to_string().contains(wanted), "{error}");
        assert!(
            error.hint_text().is_some_and(|text| text.contains(hint)),
            "{error}: {:?}",
            error.hint_text()
        );
    }
    assert!(!scratch.0.join("hub").exists(), "nothing is left of what was refused");
}
