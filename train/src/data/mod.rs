//! Data: from text files to packed, memory-mapped token sequences.
//!
//! [`prepare()`] goes from a [`DataConfig`] to two splits on disk, once per content:
//! files are selected ([`select`]), read as documents ([`corpus`]), tokenised ([`tokenizer`]),
//! partly rearranged for infilling ([`fim`]) and written as Megatron-LM indexed datasets ([`shards`]).
//! Training then reads windows of tokens ([`packing`]) at a position that can be saved ([`cursor`]).

pub mod cache;
pub mod config;
pub mod corpus;
pub mod cursor;
pub mod entropy;
pub mod error;
pub mod fim;
pub mod packing;
pub mod prepare;
pub mod report;
pub mod select;
pub mod shards;
pub mod tokenizer;

mod byte_level;
mod formats;
mod hash;
mod listing;
mod parquet_file;
mod source;
mod splits;
mod words;

pub use cache::Prepared;
pub use config::{DataConfig, Format, OnBadInput, Origin, Source, TokenizerConfig};
pub use corpus::Problem;
pub use cursor::Cursor;
pub use error::DataError;
pub use packing::PackedDataset;
pub use prepare::prepare;
pub use report::{PrepareEvent, PrepareReport, SplitReport};
pub use shards::{ShardWriter, Shards};
pub use tokenizer::Tokenizer;
