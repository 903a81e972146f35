//! Architectures as data: one row in one table, one file each.
