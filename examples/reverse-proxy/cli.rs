//! The command line and the environment.

use std::path::PathBuf;

use clap::{CommandFactory, FromArgMatches, Parser, parser::ValueSource};

use crate::settings::{Nonsense, Settings};

/// A reverse proxy that shows the Buttress layers at work.
///
/// Without a file it starts an upstream of its own and proxies to that.
/// RUST_LOG filters the log, which goes to standard error.
#[derive(Debug, Parser)]
#[command(name = "reverse-proxy", version)]
pub(crate) struct Cli {
    /// The settings [default: none, the demo]
    #[arg(long, value_name = "FILE", env = "BUTTRESS_CONFIG")]
    config: Option<PathBuf>,

    /// Where clients come in [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDR", env = "BUTTRESS_LISTEN")]
    listen: Option<String>,

    /// Health and metrics [default: 127.0.0.1:9090]
    #[arg(long, value_name = "ADDR", env = "BUTTRESS_ADMIN")]
    admin: Option<String>,

    /// Where state is kept that processes share [default: none, in memory]
    #[arg(long, value_name = "URL", env = "REDIS_URL", hide_env_values = true)]
    redis: Option<String>,

    /// How the log is written: text or json [default: text on a terminal, else json]
    #[arg(long, value_name = "FORMAT", env = "BUTTRESS_LOG_FORMAT")]
    log_format: Option<String>,

    /// Check the settings, print what they come to as YAML, and exit
    #[arg(long)]
    pub(crate) check: bool,
}

/// What the flags, the environment and the file come to.
#[derive(Debug)]
pub(crate) struct Start {
    pub(crate) settings: Settings,
    /// What the settings are called in an error: the file, or the flags.
    pub(crate) origin: String,
    /// No file was given.
    pub(crate) demo: bool,
    pub(crate) check: bool,
}

impl Start {
    /// Reads the flags, then the environment, then the file: who comes first
    /// is right. Ends the program at `--help` and at flags that do not exist.
    pub(crate) fn read() -> Result<Self, Nonsense> {
        let matches = Cli::command().get_matches();
        let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());

        // A variable that is set to nothing is a variable that is not set.
        let file = cli.config.filter(|path| !path.as_os_str().is_empty());
        let mut settings = match &file {
            Some(file) => Settings::read(file)?,
            None => Settings::default(),
        };
        let source = |id: &str, flag, variable| match matches.value_source(id) {
            Some(ValueSource::EnvVariable) => variable,
            _ => flag,
        };
        if let Some(text) = cli.listen.filter(|text| !text.is_empty()) {
            let origin = source("listen", "--listen", "BUTTRESS_LISTEN");
            settings.listen = text
                .parse()
                .map_err(|e: String| Nonsense::at(origin, "", e))?;
        }
        if let Some(text) = cli.admin.filter(|text| !text.is_empty()) {
            let origin = source("admin", "--admin", "BUTTRESS_ADMIN");
            settings.admin = text
                .parse()
                .map_err(|e: String| Nonsense::at(origin, "", e))?;
        }
        if let Some(text) = cli.log_format.filter(|text| !text.is_empty()) {
            let origin = source("log_format", "--log-format", "BUTTRESS_LOG_FORMAT");
            settings.log_format = Some(
                text.parse()
                    .map_err(|e: String| Nonsense::at(origin, "", e))?,
            );
        }
        if let Some(text) = cli.redis.filter(|text| !text.is_empty()) {
            let origin = source("redis", "--redis", "REDIS_URL");
            let urls = text.parse();
            let urls = urls.map_err(|e: String| Nonsense::at(origin, "", e))?;
            settings.redis.get_or_insert_default().url = Some(urls);
        }
        if let (Some(redis), Ok(text)) = (&mut settings.redis, std::env::var("REDIS_DB"))
            && !text.is_empty()
        {
            redis.database = Some(text.parse().map_err(|_| {
                let expected = format!("expected the number of a database, got `{text}`");
                Nonsense::at("REDIS_DB", "", expected)
            })?);
        }
        Ok(Self {
            settings,
            origin: file.as_ref().map_or_else(
                || "the flags and the environment".to_owned(),
                |file| file.display().to_string(),
            ),
            demo: file.is_none(),
            check: cli.check,
        })
    }
}
