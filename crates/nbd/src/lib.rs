//! NBD client: reads, block status, dirty bitmaps.
