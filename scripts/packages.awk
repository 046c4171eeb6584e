# Reads `cargo metadata --no-deps --format-version 1` and prints a line for
# each package: its name, `published` or `unpublished`, and its features.
#
# awk, because a machine with Rust has neither jq nor python for certain. A
# JSON text cut at its quotes is outside and inside of strings by turns, so
# that neither a brace in a description nor a long line can trouble it.

BEGIN { RS = "\"" }

inside {
    text = text $0
    match($0, /\\*$/)
    if (RLENGTH % 2) { text = text "\""; next } # that quote was escaped
    inside = 0
    if (kind[depth] == "{" && naming) key[depth] = text
    else leaf(text)
    next
}

{
    gsub(/[ \t\r\n]/, "")
    count = length($0)
    for (at = 1; at <= count; at++) {
        c = substr($0, at, 1)
        if (c == "{" || c == "[") {
            if (depth && kind[depth] == "{") feature()
            kind[++depth] = c
            key[depth] = ""
            naming = (c == "{")
        } else if (c == "}" || c == "]") {
            depth--
            if (depth == 2) package()
            naming = 0
        } else if (c == ":") {
            naming = 0
        } else if (c == ",") {
            naming = (kind[depth] == "{")
        } else {
            # A number, a truth or null: it matters here only as `publish`.
            if (depth == 3 && key[1] == "packages" && key[3] == "publish" && c == "n") open = 1
        }
    }
    inside = 1
    text = ""
}

# At a string value. `packages` is at depth 1, its list 2, a package 3.
function leaf(value) {
    if (depth == 3 && key[1] == "packages" && key[3] == "name") name = value
    # `publish = ["registry"]`: it goes somewhere.
    if (depth == 4 && key[1] == "packages" && key[3] == "publish") open = 1
}

# At the list behind a feature's name: `packages`, `features`, the name.
function feature() {
    if (depth == 4 && key[1] == "packages" && key[3] == "features") features = features " " key[4]
}

function package() {
    if (key[1] == "packages") print name, (open ? "published" : "unpublished") features
    name = features = ""
    open = 0
}
