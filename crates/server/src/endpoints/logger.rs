//! `spire.api.server.logger.v1`: how much the server logs.

use async_trait::async_trait;
use countersign_api::spire::logger::logger_server::Logger;
use countersign_api::spire::logger::{GetLoggerRequest, ResetLogLevelRequest, SetLogLevelRequest};
use countersign_api::spire::types::{self, LogLevel};
use tonic::{Request, Response, Status};
use tracing::Level;

use super::{Endpoint, invalid};
use crate::caller::Caller;

/// Our levels are fewer: what would end a process of SPIRE's is an error here.
fn level(wire: i32) -> Result<Level, Status> {
    match LogLevel::try_from(wire) {
        Ok(LogLevel::Unspecified) => Err(invalid("newLevel value cannot be LogLevel_UNSPECIFIED")),
        Ok(LogLevel::Panic | LogLevel::Fatal | LogLevel::Error) => Ok(Level::ERROR),
        Ok(LogLevel::Warn) => Ok(Level::WARN),
        Ok(LogLevel::Info) => Ok(Level::INFO),
        Ok(LogLevel::Debug) => Ok(Level::DEBUG),
        Ok(LogLevel::Trace) => Ok(Level::TRACE),
        Err(_) => Err(invalid("unsupported log level")),
    }
}

fn level_to_wire(level: Level) -> i32 {
    let level = match level {
        Level::ERROR => LogLevel::Error,
        Level::WARN => LogLevel::Warn,
        Level::INFO => LogLevel::Info,
        Level::DEBUG => LogLevel::Debug,
        Level::TRACE => LogLevel::Trace,
    };
    level.into()
}

impl Endpoint {
    fn logger(&self) -> types::Logger {
        let levels = &self.0.config.log_levels;
        types::Logger { current_level: level_to_wire(levels.current()), launch_level: level_to_wire(levels.launch()) }
    }

    fn set_level(&self, caller: &Caller, level: Option<Level>) -> Result<Response<types::Logger>, Status> {
        let levels = &self.0.config.log_levels;
        levels.set(level).map_err(Status::failed_precondition)?;
        // Whatever the level is now: somebody who reads the log later wonders why lines are missing.
        tracing::error!(%caller, level = %levels.current(), "level of logging changed");
        Ok(Response::new(self.logger()))
    }
}

#[async_trait]
impl Logger for Endpoint {
    async fn get_logger(&self, request: Request<GetLoggerRequest>) -> Result<Response<types::Logger>, Status> {
        Caller::local(&self.0, &request)?;
        Ok(Response::new(self.logger()))
    }

    async fn set_log_level(&self, request: Request<SetLogLevelRequest>) -> Result<Response<types::Logger>, Status> {
        let caller = Caller::local(&self.0, &request)?;
        self.set_level(&caller, Some(level(request.into_inner().new_level)?))
    }

    async fn reset_log_level(&self, request: Request<ResetLogLevelRequest>) -> Result<Response<types::Logger>, Status> {
        let caller = Caller::local(&self.0, &request)?;
        self.set_level(&caller, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{agent_call, local, server};
    use tonic::Code;

    #[tokio::test]
    async fn the_level_is_changed_and_reset_by_local_callers_alone() {
        let dir = tempfile::tempdir().unwrap();
        let core = server(&dir).await;
        let endpoint = Endpoint(core.clone());
        let set = |new_level: i32| endpoint.set_log_level(local(SetLogLevelRequest { new_level }));
        let levels = |logger: types::Logger| (logger.current_level(), logger.launch_level());
        let got = endpoint.get_logger(local(GetLoggerRequest {})).await.unwrap().into_inner();
        assert_eq!(levels(got), (LogLevel::Info, LogLevel::Info));
        let changed = set(LogLevel::Trace.into()).await.unwrap().into_inner();
        assert_eq!(levels(changed), (LogLevel::Trace, LogLevel::Info));
        assert_eq!(set(LogLevel::Panic.into()).await.unwrap().into_inner().current_level(), LogLevel::Error);
        for wrong in [0, 8, -1] {
            assert_eq!(set(wrong).await.unwrap_err().code(), Code::InvalidArgument);
        }
        let reset = endpoint.reset_log_level(local(ResetLogLevelRequest {})).await.unwrap().into_inner();
        assert_eq!(levels(reset), (LogLevel::Info, LogLevel::Info));
        let (_, agent) = agent_call(&core, "1").await;
        let mut foreign = Request::new(SetLogLevelRequest { new_level: LogLevel::Trace.into() });
        *foreign.extensions_mut() = agent.extensions().clone();
        assert_eq!(endpoint.set_log_level(foreign).await.unwrap_err().code(), Code::PermissionDenied);
    }
}
