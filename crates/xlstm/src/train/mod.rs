//! Training: the configuration of a run, its records and what it reports while it runs.
pub mod chart;
pub mod config;
#[cfg(feature = "cuda")]
mod cuda;
pub mod curve;
pub mod learner;
pub mod load;
pub mod metrics;
mod original;
pub mod progress;
#[cfg(test)]
mod schema;
pub mod sources;
pub mod texts;
pub mod trainer;

pub use chart::{Chart, Line, Scale};
pub use config::{
    DataConfig, OptimizerConfig, RunConfig, SampleConfig, ScheduleConfig, StageConfig, TrainingConfig,
};
pub use curve::Curve;
pub use load::unknown_name;
pub use metrics::{MetricsLog, Row, TrainingRow, ValidationRow};
pub use progress::{Observer, Progress, Silent, Summary, Validation};
pub use sources::{Paths, TextSource, TokenizerChoice};
pub use texts::Texts;
pub use trainer::{End, Outcome, train};
