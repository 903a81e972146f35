//! `/openapi.json`: made from the table of endpoints and the schemas beside this file, so that no endpoint can be
//! missing.

use super::App;
use super::guard::Access;
use super::routes::{Answer, ENDPOINTS, Endpoint};
use axum::Json;
use axum::extract::State;
use serde_json::{Map, Value, json};
use std::sync::LazyLock;

static DOCUMENT: LazyLock<Value> = LazyLock::new(build);

/// The endpoint. Beside what never changes it has the names of this house's models in its examples, so that they can be
/// tried as they are.
pub(super) async fn document(State(app): State<App>) -> Json<Value> {
    let names: Vec<String> = app.client.catalog().cards().map(|card| card.name.clone()).collect();
    let mut document = DOCUMENT.clone();
    if let (Some(first), Some(schemas)) = (names.first(), document["components"]["schemas"].as_object_mut()) {
        for schema in schemas.values_mut() {
            if let Some(model) = schema.pointer_mut("/properties/model") {
                model["examples"] = json!(names);
            }
            for example in schema.get_mut("examples").and_then(Value::as_array_mut).into_iter().flatten() {
                example["model"] = json!(first);
            }
        }
    }
    Json(document)
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
        responses[*status] = json!({ "description": what, "content": { JSON: held(reference("Error")) } });
    }
    let mut operation = json!({ "summary": endpoint.summary, "responses": responses });
    if endpoint.access != Access::Public {
        operation["security"] = json!([{ "key": [] }, {}]);
    }
    if let Some(schema) = endpoint.takes {
        operation["requestBody"] = json!({ "required": true, "content": { JSON: held(reference(schema)) } });
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
    const EVENTS: &str = "text/event-stream";
    let content = match endpoint.gives {
        Answer::Json(whole) => json!({ JSON: held(reference(whole)) }),
        Answer::JsonOrChunks(whole, chunk) => {
            let chunk = embedded(json!({ "anyOf": [reference(chunk), reference("Error")] }));
            let data = json!({ "anyOf": [{ "const": "[DONE]" }, chunk] });
            json!({ JSON: held(reference(whole)), EVENTS: held(event(data)) })
        }
        Answer::JsonOrEvents(whole, data) => {
            json!({ JSON: held(reference(whole)), EVENTS: held(event(embedded(reference(data)))) })
        }
        Answer::Events => json!({ EVENTS: held(event(embedded(json!({ "type": ["object", "array"] })))) }),
        Answer::Text(kind) => json!({ kind: held(json!({ "type": "string" })) }),
    };
    json!({ "description": "As asked", "content": content })
}

/// An event of a stream.
///
/// `OpenAPI` 3.1 does not say what the schema of a stream describes. Whoever reads streams by it, generators of requests
/// and OpenAI's own document, has it describe one event; ours are objects of the fields that the HTML standard's event
/// streams have. 3.2 has a key of its own for that, `itemSchema`, which tools for 3.1 do not know.
fn event(data: Value) -> Value {
    let name = json!({ "type": "string" });
    json!({ "type": "object", "required": ["data"], "properties": { "event": name, "data": data } })
}

/// A text that is a document.
fn embedded(schema: Value) -> Value {
    json!({ "type": "string", "contentMediaType": JSON, "contentSchema": schema })
}

const JSON: &str = "application/json";

/// A body that a schema holds.
fn held(schema: Value) -> Value {
    json!({ "schema": schema })
}

fn reference(schema: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{schema}") })
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

    /// Whoever takes `stream` answers with events, and their schemas are of documents.
    #[test]
    fn streams_are_described() {
        let document = build();
        for endpoint in ENDPOINTS {
            let properties = &document["components"]["schemas"][endpoint.takes.unwrap_or("Any")]["properties"];
            let streams = properties.get("stream").is_some() || endpoint.path == "/api/events";
            let answer = &document["paths"][endpoint.path][endpoint.method]["responses"]["200"]["content"];
            let data = answer["text/event-stream"].pointer("/schema/properties/data");
            assert_eq!(data.is_some(), streams, "{}", endpoint.path);
            let document = data.map(|data| data.pointer("/anyOf/1").unwrap_or(data));
            assert!(document.is_none_or(|document| document["contentSchema"].is_object()), "{}", endpoint.path);
        }
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
            let kinds = operation["responses"]["200"]["content"].as_object().map_or(0, Map::len);
            assert!(kinds > 0, "{} {} answers with something", endpoint.method, endpoint.path);
        }
    }
}
