//! Custom operations that consume weights, each with its backward.
