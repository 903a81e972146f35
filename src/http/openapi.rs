//! `/openapi.json`: made from the table of endpoints and the schemas beside this file, so that no endpoint can be
//! missing.

use super::guard::Access;
use super::routes::{ENDPOINTS, Endpoint};
use axum::Json;
use serde_json::{Map, Value, json};
use std::sync::LazyLock;

static DOCUMENT: LazyLock<Value> = LazyLock::new(build);

/// The endpoint.
pub(super) async fn document() -> Json<&'static Value> {
    Json(&DOCUMENT)
}

fn build() -> Value {
    let schemas: Value = serde_json::from_str(include_str!("schemas.json")).expect("schemas.json is checked by a test");
    let mut paths: Map<String, Value> = Map::new();
    for endpoint in ENDPOINTS {
        let path = paths.entry(endpoint.path).or_insert_with(|| json!({}));
        path[endpoint.method] = operation(endpoint);
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Playhouse",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Language models on the GPUs of one box, behind the OpenAI API.",
            "license": { "name": "Apache-2.0 OR MIT", "identifier": "Apache-2.0 OR MIT" },
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": { "key": { "type": "http", "scheme": "bearer" } },
        },
    })
}

fn operation(endpoint: &Endpoint) -> Value {
    let mut responses = json!({ "200": success(endpoint) });
    for (status, what) in failures(endpoint) {
        responses[*status] = json!({ "description": what, "content": content("application/json", "Error") });
    }
    let mut operation = json!({ "summary": endpoint.summary, "responses": responses });
    if endpoint.access != Access::Public {
        operation["security"] = json!([{ "key": [] }, {}]);
    }
    if let Some(schema) = endpoint.takes {
        operation["requestBody"] = json!({ "required": true, "content": content("application/json", schema) });
    }
    let parameter = |name: &str, place: &str| json!([{ "name": name, "in": place, "required": place == "path", "schema": { "type": "string", "minLength": 1 } }]);
    if endpoint.path.contains("{id}") {
        operation["parameters"] = parameter("id", "path");
    }
    if endpoint.path == "/health/ready" {
        operation["parameters"] = parameter("model", "query");
    }
    operation
}

fn success(endpoint: &Endpoint) -> Value {
    let mut answer = json!({ "description": "As asked", "content": {} });
    match endpoint.gives {
        Some(schema) => answer["content"] = content("application/json", schema),
        None => {
            let kind = match endpoint.path {
                "/metrics" => "application/openmetrics-text",
                "/" => "text/html",
                "/app.js" => "text/javascript",
                "/style.css" => "text/css",
                _ => "text/event-stream",
            };
            answer["content"][kind] = json!({ "schema": { "type": "string" } });
        }
    }
    let streams =
        endpoint.takes.is_some_and(|schema| matches!(schema, "ChatRequest" | "CompletionRequest" | "ResponseRequest"));
    if streams {
        answer["content"]["text/event-stream"] = json!({ "schema": { "type": "string" } });
    }
    answer
}

fn content(kind: &str, schema: &str) -> Value {
    json!({ kind: { "schema": { "$ref": format!("#/components/schemas/{schema}") } } })
}

fn failures(endpoint: &Endpoint) -> &'static [(&'static str, &'static str)] {
    const PUBLIC: &[(&str, &str)] = &[("403", "Host or origin not allowed"), ("503", "Not ready")];
    const READ: &[(&str, &str)] = &[("401", "No key"), ("403", "Not allowed"), ("404", "No such model")];
    const WRITE: &[(&str, &str)] = &[
        ("400", "A parameter is wrong; `param` names it"),
        ("401", "No key"),
        ("403", "Not allowed"),
        ("404", "No such model"),
        ("408", "The body did not come in time"),
        ("413", "The body is too large"),
        ("422", "The request was in flight at too many deaths of workers"),
        ("429", "Busy; `Retry-After` says when to ask again"),
        ("500", "A mistake of ours"),
        ("501", "Known, and not done"),
        ("503", "Loading, restarting or stopping; `Retry-After` says when to ask again"),
        ("504", "The deadline passed"),
    ];
    match (endpoint.takes, endpoint.access) {
        (Some(_), _) => WRITE,
        (None, Access::Public) => {
            if endpoint.path == "/health/ready" {
                const READY: &[(&str, &str)] = &[
                    ("400", "A parameter is wrong"),
                    ("403", "Host or origin not allowed"),
                    ("404", "No such model"),
                    ("503", "Not ready"),
                ];
                READY
            } else {
                PUBLIC
            }
        }
        (None, _) => READ,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// Every `$ref` leads somewhere, and every schema is used.
    #[test]
    fn references_lead_somewhere() {
        let document = build();
        let mut refs = BTreeSet::new();
        collect(&document, &mut refs);
        let schemas = document["components"]["schemas"].as_object().expect("an object");
        let names: BTreeSet<String> = schemas.keys().map(|name| format!("#/components/schemas/{name}")).collect();
        assert_eq!(refs, names);
    }

    fn collect(value: &Value, refs: &mut BTreeSet<String>) {
        match value {
            Value::Object(fields) => {
                if let Some(Value::String(target)) = fields.get("$ref") {
                    refs.insert(target.clone());
                }
                fields.values().for_each(|value| collect(value, refs));
            }
            Value::Array(list) => list.iter().for_each(|value| collect(value, refs)),
            _ => {}
        }
    }

    #[test]
    fn every_endpoint_is_there() {
        let document = build();
        for endpoint in ENDPOINTS {
            let operation = &document["paths"][endpoint.path][endpoint.method];
            assert_eq!(operation["summary"], endpoint.summary, "{} {}", endpoint.method, endpoint.path);
        }
    }
}
