//! `RUSTFLAGS="--cfg buttress_loom" cargo test -p buttress-core --lib --release loom`
