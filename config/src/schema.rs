//! The JSON Schema of the file, made from the types in `raw`, and what can be asked of it.

use crate::raw::RawConfig;
use serde_json::Value;

/// The JSON Schema (draft 2020-12) of the configuration file. Editors complete and check with it; the copy in
/// `config/playhouse.schema.json` is the same.
pub fn json_schema() -> Value {
    let mut schema = schemars::schema_for!(RawConfig).to_value();
    strip_null(&mut schema);
    schema
}

/// TOML has no null: an optional key is one that may be absent, not one that may be null.
fn strip_null(node: &mut Value) {
    match node {
        Value::Array(items) => items.iter_mut().for_each(strip_null),
        Value::Object(object) => {
            if let Some(Value::Array(types)) = object.get_mut("type") {
                types.retain(|name| name != "null");
                if let [only] = types.as_slice() {
                    let only = only.clone();
                    object.insert("type".into(), only);
                }
            }
            if let Some(Value::Array(options)) = object.get_mut("anyOf") {
                options.retain(|option| option.get("type") != Some(&Value::from("null")));
                if let [Value::Object(only)] = options.as_slice() {
                    let only = only.clone();
                    object.remove("anyOf");
                    for (key, value) in only {
                        object.entry(key).or_insert(value);
                    }
                }
            }
            object.values_mut().for_each(strip_null);
        }
        _ => {}
    }
}

/// A table or value of the schema.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Node<'a> {
    root: &'a Value,
    node: &'a Value,
}

impl<'a> Node<'a> {
    pub(crate) fn root(root: &'a Value) -> Self {
        Self { root, node: root }
    }

    fn resolve(self) -> Self {
        let target = self.node.get("$ref").and_then(Value::as_str).and_then(|path| path.strip_prefix('#'));
        let node = target.and_then(|path| self.root.pointer(path)).unwrap_or(self.node);
        Self { root: self.root, node }
    }

    /// The keys this table may have; nothing if it is not a table.
    pub(crate) fn keys(self) -> Vec<&'a str> {
        let properties = self.resolve().node.get("properties").and_then(Value::as_object);
        properties.map_or(Vec::new(), |properties| properties.keys().map(String::as_str).collect())
    }

    /// The value under a key of this table.
    pub(crate) fn key(self, name: &str) -> Option<Self> {
        let node = self.resolve().node.get("properties")?.get(name)?;
        Some(Self { root: self.root, node })
    }

    /// What the elements of this array are.
    pub(crate) fn items(self) -> Option<Self> {
        let node = self.resolve().node.get("items")?;
        Some(Self { root: self.root, node })
    }

    /// Whether this is a text and nothing else.
    pub(crate) fn is_text(self) -> bool {
        let node = self.resolve().node;
        node.get("type") == Some(&Value::from("string")) || (node.get("enum").is_some() && node.get("type").is_none())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn walks_references_and_arrays() {
        let schema = json_schema();
        let root = Node::root(&schema);
        assert!(root.keys().contains(&"model"));
        let model = root.key("model").and_then(Node::items).expect("model is an array");
        assert!(model.keys().contains(&"kv_budget"));
        assert!(model.key("name").expect("name").is_text());
        assert!(!model.key("replicas").expect("replicas").is_text());
        assert!(root.key("host").and_then(|host| host.key("address")).expect("address").is_text());
    }
}
