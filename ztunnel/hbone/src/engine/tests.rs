//! Against another implementation of HTTP/2, on either side, and against any bytes.

mod foreign;
mod held;
mod parser;
