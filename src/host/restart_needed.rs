//! The keys that are read once: a reload says which of them a new configuration changes.

use playhouse_config::checked::Host;
use playhouse_config::{Config, Limits};

/// The keys that differ and that only another start takes over: those of the front, and simulated devices.
pub(super) fn restart_needed(old: &Config, new: &Config) -> Vec<String> {
    // Taken apart whole: who adds a section or a key decides here, or it does not compile.
    let Config { path: _, host, models: _, supervision: _, simulate } = old;
    let Host {
        address,
        insecure,
        admin_socket,
        http_socket,
        api_keys,
        api_keys_file,
        admin_keys,
        admin_keys_file,
        tls,
        allowed_hosts,
        cors_origins,
        per_key,
        keep_alive,
        look_every,
        otlp_endpoint,
        drain: _,
        log,
        log_prompts,
        limits,
    } = host;
    let is = &new.host;
    let differs = [
        ("host.address", *address != is.address),
        ("host.insecure", *insecure != is.insecure),
        ("host.admin_socket", *admin_socket != is.admin_socket),
        ("host.http_socket", *http_socket != is.http_socket),
        ("host.api_keys", *api_keys != is.api_keys),
        ("host.api_keys_file", *api_keys_file != is.api_keys_file),
        ("host.admin_keys", *admin_keys != is.admin_keys),
        ("host.admin_keys_file", *admin_keys_file != is.admin_keys_file),
        ("host.tls", *tls != is.tls),
        ("host.allowed_hosts", *allowed_hosts != is.allowed_hosts),
        ("host.cors_origins", *cors_origins != is.cors_origins),
        ("host.per_key", *per_key != is.per_key),
        ("host.keep_alive", *keep_alive != is.keep_alive),
        ("host.look_every", *look_every != is.look_every),
        ("host.otlp_endpoint", *otlp_endpoint != is.otlp_endpoint),
        ("host.log", *log != is.log),
        ("host.log_prompts", *log_prompts != is.log_prompts),
        ("host.limits", of_the_front(limits) != of_the_front(&is.limits)),
        ("simulate", *simulate != new.simulate),
    ];
    differs.into_iter().filter(|(_, differs)| *differs).map(|(key, _)| key.to_owned()).collect()
}

/// The limits of the front, without those that the router takes over.
fn of_the_front(limits: &Limits) -> Limits {
    let Limits { queued_requests, queued_tokens, request_timeout, stream_events, .. } = Limits::default();
    Limits { queued_requests, queued_tokens, request_timeout, stream_events, ..limits.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn what_is_read_once_is_named_and_what_is_taken_over_is_not() {
        let (old, mut new) = (Config::default(), Config::default());
        new.host.drain = Duration::from_secs(1);
        new.host.limits.queued_requests = 7;
        new.supervision.max_restarts = 99;
        new.models.clear();
        assert!(restart_needed(&old, &new).is_empty());
        new.host.address.set_port(1);
        new.host.limits.connections = 7;
        assert_eq!(restart_needed(&old, &new), ["host.address", "host.limits"]);
    }
}
