//! Judges `[host]`: where it listens, who may speak to it, what it takes on.

use super::Checker;
use crate::checked::{ApiKey, Host, Limits, PerKey, Tls};
use crate::raw::{RawHost, RawLimits, RawPerKey, RawSize, RawTls};
use crate::source::At;
use crate::units::Bytes;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// A path longer than this cannot be the name of a Unix socket (`sun_path`, less the final zero).
const SOCKET_PATH_BYTES_MAX: usize = 107;

impl Checker {
    pub(super) fn host(&mut self, raw: &RawHost, folder: &Path) -> Host {
        let default = Host::default();
        let host = Host {
            address: raw.address.as_ref().and_then(|text| self.address(text)).unwrap_or(default.address),
            insecure: raw.insecure.as_ref().is_some_and(|insecure| *insecure.value()),
            admin_socket: raw.admin_socket.as_ref().map(|path| self.socket_path(path)),
            http_socket: raw.http_socket.as_ref().map(|path| self.socket_path(path)),
            api_keys: self.keys(raw.api_keys.as_deref().unwrap_or_default()),
            api_keys_file: self.file(raw.api_keys_file.as_ref(), folder),
            admin_keys: self.keys(raw.admin_keys.as_deref().unwrap_or_default()),
            admin_keys_file: self.file(raw.admin_keys_file.as_ref(), folder),
            tls: self.tls(&raw.tls, folder),
            allowed_hosts: self.allowed_hosts(raw.allowed_hosts.as_deref().unwrap_or_default()),
            cors_origins: self.cors_origins(raw.cors_origins.as_deref().unwrap_or_default()),
            per_key: self.per_key(&raw.per_key),
            keep_alive: self.positive(&raw.keep_alive, default.keep_alive),
            look_every: self.positive(&raw.look_every, default.look_every),
            otlp_endpoint: raw.otlp_endpoint.as_ref().and_then(|text| self.otlp_endpoint(text)),
            drain: self.duration(&raw.drain, default.drain),
            log: raw.log.as_ref().map_or(default.log, |log| *log.value()),
            log_prompts: raw.log_prompts.as_ref().map_or(default.log_prompts, |is_asked| *is_asked.value()),
            limits: self.limits(&raw.limits),
        };
        if let Some(text) = &raw.address {
            self.exposure(text, &host, &raw.tls);
        }
        host
    }

    /// Refuses an address that others can reach where nothing would stop them.
    fn exposure(&mut self, text: &At<String>, host: &Host, tls: &RawTls) {
        if host.address.ip().is_loopback() || host.insecure {
            return;
        }
        let has_keys = !host.api_keys.is_empty() || host.api_keys_file.is_some();
        // Half of a pair is reported where it stands.
        let has_tls = tls.certificate.is_some() || tls.key.is_some();
        let missing = match (has_keys, has_tls) {
            (true, true) => return,
            (true, false) => "is no certificate",
            (false, true) => "are no keys",
            (false, false) => "are neither keys nor a certificate",
        };
        let message = format!("{} can be reached from other machines and there {missing}", host.address);
        let help = "set `api_keys` or `api_keys_file`, and `tls.certificate` and `tls.key`, in [host]; or listen on \
                    127.0.0.1; or say `insecure = true`";
        self.report.add(text.span(), message).help = Some(help.into());
    }

    fn address(&mut self, text: &At<String>) -> Option<SocketAddr> {
        let numeric = text.value().replacen("localhost:", "127.0.0.1:", 1);
        if let Ok(address) = numeric.parse() {
            return Some(address);
        }
        let help = match text.value().parse::<std::net::IpAddr>() {
            Ok(ip) => format!("a port is missing: write `{}`", SocketAddr::new(ip, 7070)),
            Err(_) => "write an IP address and a port, such as `127.0.0.1:7070` or `[::1]:7070`".into(),
        };
        self.report.add(text.span(), format!("`{}` is not an address", text.value())).help = Some(help);
        None
    }

    fn socket_path(&mut self, path: &At<String>) -> PathBuf {
        let len = path.value().len();
        if len == 0 || len > SOCKET_PATH_BYTES_MAX {
            let message = format!("a socket's path has 1 to {SOCKET_PATH_BYTES_MAX} bytes, this one has {len}");
            self.report.add(path.span(), message);
        }
        PathBuf::from(path.value())
    }

    /// What the file says is relative to the file; what the environment or an argument says, to where the program runs.
    fn file(&mut self, path: Option<&At<String>>, folder: &Path) -> Option<PathBuf> {
        let path = path?;
        if path.value().is_empty() {
            self.report.add(path.span(), "the path of a file is empty");
        }
        let is_of_file = self.report.sources.is_of_file(&path.span());
        Some(if is_of_file { folder.join(path.value()) } else { PathBuf::from(path.value()) })
    }

    fn tls(&mut self, raw: &RawTls, folder: &Path) -> Option<Tls> {
        let pair = (self.file(raw.certificate.as_ref(), folder), self.file(raw.key.as_ref(), folder));
        let half = match (&raw.certificate, &raw.key) {
            (Some(certificate), None) => Some((certificate, "`certificate` is of no use without `key`")),
            (None, Some(key)) => Some((key, "`key` is of no use without `certificate`")),
            _ => None,
        };
        if let Some((found, message)) = half {
            self.report.add(found.span(), message);
        }
        let (Some(certificate), Some(key)) = pair else { return None };
        Some(Tls { certificate, key })
    }

    fn allowed_hosts(&mut self, raw: &[At<String>]) -> Vec<String> {
        for name in raw {
            let text = name.value();
            let is_name = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            if text.is_empty() || !text.chars().all(is_name) {
                let help = "a name alone, such as `models.example`: no scheme, no port, no `*`";
                self.report.add(name.span(), format!("`{text}` is not a host name")).help = Some(help.into());
            }
        }
        raw.iter().map(|name| name.value().clone()).collect()
    }

    fn cors_origins(&mut self, raw: &[At<String>]) -> Vec<String> {
        for origin in raw {
            let text = origin.value();
            let authority = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
            let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.:[]".contains(c);
            let is_origin = authority.is_some_and(|rest| !rest.is_empty() && rest.chars().all(is_plain));
            if text != "*" && !is_origin {
                let help = "scheme, name and perhaps port, such as `https://chat.example`, without a path; or `*`";
                self.report.add(origin.span(), format!("`{text}` is not an origin")).help = Some(help.into());
            }
        }
        raw.iter().map(|origin| origin.value().clone()).collect()
    }

    fn per_key(&mut self, raw: &RawPerKey) -> PerKey {
        let numbers = |checker: &mut Self, raw: &Option<At<u32>>| {
            raw.as_ref().map(|number| checker.number(raw, *number.value(), 1..=1_000_000))
        };
        PerKey {
            streams: numbers(self, &raw.streams),
            requests_per_minute: numbers(self, &raw.requests_per_minute),
            tokens_per_minute: raw
                .tokens_per_minute
                .as_ref()
                .map(|number| self.number(&raw.tokens_per_minute, *number.value(), 1..=1 << 40)),
        }
    }

    fn otlp_endpoint(&mut self, text: &At<String>) -> Option<String> {
        let rest = text.value().strip_prefix("http://");
        if rest.is_none_or(|rest| rest.is_empty() || rest.contains(char::is_whitespace)) {
            let help = "the address of a collector on this machine or network, such as `http://127.0.0.1:4318`";
            let message = format!("`{}` is not an address for traces", text.value());
            self.report.add(text.span(), message).help = Some(help.into());
            return None;
        }
        Some(text.value().clone())
    }

    fn keys(&mut self, raw: &[At<String>]) -> Vec<ApiKey> {
        let mut seen: HashMap<&str, Range<usize>> = HashMap::new();
        for key in raw {
            if key.value().is_empty() || !key.value().bytes().all(|byte| byte.is_ascii_graphic()) {
                let message = "a key is not empty and has only visible ASCII characters";
                self.report.add(key.span(), message).hide_values();
            }
            if let Some(first) = seen.insert(key.value(), key.span()) {
                let found = self.report.add_related(key.span(), "this key is there twice", first, "first here");
                found.hide_values();
            }
        }
        raw.iter().map(|key| ApiKey::new(key.value().clone())).collect()
    }

    fn limits(&mut self, raw: &RawLimits) -> Limits {
        let default = Limits::default();
        Limits {
            connections: self.number(&raw.connections, default.connections, 1..=1_000_000),
            connections_per_ip: self.number(&raw.connections_per_ip, default.connections_per_ip, 1..=1_000_000),
            http2_streams: self.number(&raw.http2_streams, default.http2_streams, 1..=65_536),
            body_bytes: self.body(&raw.body, default.body_bytes),
            header_timeout: self.positive(&raw.header_timeout, default.header_timeout),
            body_timeout: self.positive(&raw.body_timeout, default.body_timeout),
            idle_timeout: self.positive(&raw.idle_timeout, default.idle_timeout),
            request_timeout: self.positive(&raw.request_timeout, default.request_timeout),
            queued_requests: self.number(&raw.queued_requests, default.queued_requests, 1..=1_000_000),
            queued_tokens: self.number(&raw.queued_tokens, default.queued_tokens, 1..=1 << 40),
            stream_events: self.number(&raw.stream_events, default.stream_events, 1..=65_536),
            client_timeout: self.positive(&raw.client_timeout, default.client_timeout),
        }
    }

    fn body(&mut self, raw: &Option<At<RawSize>>, default: u64) -> u64 {
        let Some(text) = raw else { return default };
        let Some(bytes) = self.size(&text.value().0, text.span()) else { return default };
        let (least, most) = (1 << 10, 1 << 30);
        if !(least..=most).contains(&bytes) {
            let message = format!("a body of {} is out of range: {} to {}", Bytes(bytes), Bytes(least), Bytes(most));
            self.report.add(text.span(), message);
        }
        bytes
    }
}
