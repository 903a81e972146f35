//! Paged KV, scheduler, interpreter, sampler: requests in, token events out.
