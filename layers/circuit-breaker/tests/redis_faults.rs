//! Shared breakers.
