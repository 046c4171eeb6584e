//! What hyper's errors say of how far a request has come.

use std::error::Error;

use crate::Cause;

pub(crate) fn cause(error: &(dyn Error + 'static)) -> Option<Cause> {
    if let Some(error) = error.downcast_ref::<hyper_util::client::legacy::Error>()
        && error.is_connect()
    {
        return Some(Cause::Connect);
    }
    if let Some(error) = error.downcast_ref::<h2::Error>() {
        return of_h2(error);
    }
    let error = error.downcast_ref::<hyper::Error>()?;
    // An error of the request's own body, or of what the callee sent, is none
    // of the connection.
    if error.is_canceled() {
        // It never left the queue of the connection.
        Some(Cause::Connect)
    } else if error.is_incomplete_message() || error.is_closed() {
        Some(Cause::Reset)
    } else {
        None
    }
}

fn of_h2(error: &h2::Error) -> Option<Cause> {
    if error.reason() == Some(h2::Reason::REFUSED_STREAM) && error.is_remote() {
        return Some(Cause::RefusedStream);
    }
    // What has an `io::Error` in it is told by that.
    let broken = error.is_go_away()
        || matches!(
            error.reason(),
            Some(
                h2::Reason::NO_ERROR
                    | h2::Reason::INTERNAL_ERROR
                    | h2::Reason::CANCEL
                    | h2::Reason::ENHANCE_YOUR_CALM
            )
        );
    broken.then_some(Cause::Reset)
}
