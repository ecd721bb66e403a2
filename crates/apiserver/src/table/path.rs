//! JSONPath as far as printer columns use it: fields, `[*]`, `[0]`, `['a.b']` and
//! `[?(@.type=="Ready")]`.

use serde_json::Value;

/// Steps of a path, at most.
const STEPS: usize = 64;

/// The values at a path; none where it leads nowhere or is not understood.
pub fn find<'a>(object: &'a Value, path: &str) -> Vec<&'a Value> {
    let mut found = vec![object];
    let mut rest = path.trim();
    for _ in 0..STEPS {
        if rest.is_empty() {
            return found;
        }
        let Some((step, next)) = step(rest) else { return Vec::new() };
        found = found.into_iter().flat_map(|value| step.follow(value)).collect();
        rest = next;
    }
    Vec::new()
}

enum Step {
    Field(String),
    Index(i64),
    All,
    Where(Vec<String>, String, bool),
}

impl Step {
    fn follow<'a>(&self, value: &'a Value) -> Vec<&'a Value> {
        match (self, value) {
            (Self::Field(name), value) => {
                value.get(name).into_iter().filter(|v| !v.is_null()).collect()
            }
            (Self::Index(at), Value::Array(all)) => {
                let at = if *at < 0 { *at + all.len() as i64 } else { *at };
                usize::try_from(at).ok().and_then(|at| all.get(at)).into_iter().collect()
            }
            (Self::All, Value::Array(all)) => all.iter().collect(),
            (Self::All, Value::Object(map)) => map.values().collect(),
            (Self::Where(fields, wanted, is), Value::Array(all)) => {
                let text = |item: &Value| {
                    let mut at = item;
                    for field in fields {
                        at = &at[field.as_str()];
                    }
                    super::plain(at)
                };
                all.iter().filter(|item| (text(item) == *wanted) == *is).collect()
            }
            _ => Vec::new(),
        }
    }
}

/// The first step of a path, and the rest.
fn step(path: &str) -> Option<(Step, &str)> {
    if let Some(inner) = path.strip_prefix('[') {
        let end = closing(inner)?;
        let (inside, rest) = (&inner[..end], &inner[end + 1..]);
        return Some((bracket(inside)?, rest));
    }
    let rest = path.strip_prefix('.').unwrap_or(path);
    // A dot within a name is escaped.
    let mut name = String::new();
    let mut chars = rest.char_indices();
    let mut end = rest.len();
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => name.extend(chars.next().map(|(_, c)| c)),
            '.' | '[' => {
                end = at;
                break;
            }
            c => name.push(c),
        }
    }
    let step = if name == "*" { Step::All } else { Step::Field(name) };
    Some((step, &rest[end..]))
}

/// Where the bracket closes, not within quotes.
fn closing(text: &str) -> Option<usize> {
    let mut quote = None;
    for (at, c) in text.char_indices() {
        match (quote, c) {
            (None, ']') => return Some(at),
            (None, '\'' | '"') => quote = Some(c),
            (Some(q), c) if q == c => quote = None,
            _ => {}
        }
    }
    None
}

fn bracket(inside: &str) -> Option<Step> {
    let inside = inside.trim();
    if inside == "*" {
        return Some(Step::All);
    }
    if let Some(condition) = inside.strip_prefix("?(").and_then(|c| c.strip_suffix(')')) {
        let (left, right, is) = match condition.split_once("==") {
            Some((left, right)) => (left, right, true),
            None => {
                let (left, right) = condition.split_once("!=")?;
                (left, right, false)
            }
        };
        let fields = left.trim().strip_prefix('@')?.split('.').filter(|f| !f.is_empty());
        return Some(Step::Where(
            fields.map(str::to_owned).collect(),
            unquoted(right.trim()).to_owned(),
            is,
        ));
    }
    if inside.starts_with(['\'', '"']) {
        return Some(Step::Field(unquoted(inside).to_owned()));
    }
    inside.parse().ok().map(Step::Index)
}

fn unquoted(text: &str) -> &str {
    let inner = |quote| text.strip_prefix(quote).and_then(|t| t.strip_suffix(quote));
    inner('\'').or_else(|| inner('"')).unwrap_or(text)
}
