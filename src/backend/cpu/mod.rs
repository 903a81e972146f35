//! The CPU backend: plain and readable, the oracle for every other device.
