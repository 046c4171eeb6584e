//! What carries the messages: any service, behind one type.

use std::{
    future::poll_fn,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::{Pin, pin},
    sync::Arc,
    task::Poll,
};

use buttress_core::{BoxError, clock::SharedWallClock, retry_after, sync::Mutex};
use buttress_webhook::WholeBody;
use bytes::{Buf, BufMut, BytesMut};
use http::{Request, Response};
use http_body::Body;
use tower_service::Service;

use crate::{
    Cause,
    guard::Denied,
    outcome::{Seen, Word},
};

/// How much of an answer's body is read, and how much of that kept.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Caps {
    pub(crate) read: usize,
    pub(crate) kept: usize,
}

/// An exchange as far as it has come: what is here when it is cut off counts.
#[derive(Debug, Default)]
pub(crate) struct Exchange {
    pub(crate) seen: Seen,
    pub(crate) body: BytesMut,
}

pub(crate) type Exchanging<'a> = Pin<Box<dyn Future<Output = Result<(), Cause>> + Send + 'a>>;

pub(crate) trait Transport: Send + Sync {
    fn send<'a>(
        &'a self,
        request: Request<WholeBody>,
        caps: Caps,
        wall: &'a SharedWallClock,
        exchange: &'a mut Exchange,
    ) -> Exchanging<'a>;
}

/// A service of which each attempt has a clone.
struct Any<S>(Mutex<S>);

pub(crate) fn transport<S, B>(service: S) -> Arc<dyn Transport>
where
    S: Service<Request<WholeBody>, Response = Response<B>> + Clone + Send + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send,
    B: Body + Send,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    Arc::new(Any(Mutex::new(service)))
}

impl<S, B> Transport for Any<S>
where
    S: Service<Request<WholeBody>, Response = Response<B>> + Clone + Send + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send,
    B: Body + Send,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    fn send<'a>(
        &'a self,
        request: Request<WholeBody>,
        caps: Caps,
        wall: &'a SharedWallClock,
        exchange: &'a mut Exchange,
    ) -> Exchanging<'a> {
        Box::pin(async move {
            let uri = request.uri().clone();
            let failed = |error: BoxError| match Denied::of(&*error) {
                Some(denied) => Cause::Denied(*denied),
                None => Cause::Transport(words(&error, &uri)),
            };
            let mut service = self.0.lock().clone();
            let ready = poll_fn(|cx| service.poll_ready(cx)).await;
            ready.map_err(|error| failed(error.into()))?;
            let answer = service.call(request).await;
            let answer = answer.map_err(|error| failed(error.into()))?;
            let (head, body) = answer.into_parts();
            exchange.seen.status = Some(head.status);
            exchange.seen.retry_after = retry_after::parse(&head.headers, wall.unix_now());
            exchange.seen.word = Word::of(&head.headers);
            let mut body = pin!(body);
            let mut read = 0;
            while let Some(frame) = poll_fn(|cx| body.as_mut().poll_frame(cx)).await {
                let frame = frame.map_err(|error| Cause::Broken(words(&error.into(), &uri)))?;
                // A frame without data counts as a byte: they, too, end.
                read += 1;
                if let Ok(data) = frame.into_data() {
                    read += data.remaining().saturating_sub(1);
                    let room = caps.kept - exchange.body.len();
                    exchange.body.put(data.take(room));
                }
                // Dropped unread, which closes the connection where it must.
                if read >= caps.read {
                    break;
                }
            }
            Ok(())
        })
    }
}

/// What an error says and what its causes do, without the url: its path and
/// query may be secrets.
fn words(error: &BoxError, url: &http::Uri) -> Arc<str> {
    const LONGEST: usize = 256;
    /// What is shorter is a word that errors are made of, and no secret.
    const SECRET: usize = 8;
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let more = error.to_string();
        // Some say again what their cause says.
        if !text.contains(&more) {
            text = text + ": " + &more;
        }
        source = error.source();
    }
    let path = url.path();
    let secrets = [
        Some(url.to_string()),
        url.path_and_query().map(|path| path.as_str().to_owned()),
        url.query().map(str::to_owned),
        Some(path.to_owned()),
    ];
    for secret in secrets.into_iter().flatten() {
        // "/" is none.
        if secret.len() > 1 {
            text = text.replace(&secret, "…");
        }
    }
    // Whoever writes a url in a way of their own writes these as they are.
    let plain = |char: char| char.is_ascii_alphanumeric() || "-_.~".contains(char);
    let target = url.path_and_query().map_or("", |target| target.as_str());
    for part in target.split(|char| !plain(char)) {
        if part.len() >= SECRET {
            text = text.replace(part, "…");
        }
    }
    if text.len() > LONGEST {
        let end = (0..=LONGEST).rev().find(|end| text.is_char_boundary(*end));
        text.truncate(end.unwrap_or(0));
        text.push('…');
    }
    text.into()
}

/// The future's end; `None` if it panics.
pub(crate) async fn caught<F: Future>(future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    poll_fn(
        |cx| match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(cx))) {
            Ok(Poll::Pending) => Poll::Pending,
            Ok(Poll::Ready(output)) => Poll::Ready(Some(output)),
            Err(_) => Poll::Ready(None),
        },
    )
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_does_not_show_the_url() {
        let url = "https://a.example/T0KEN/x?key=K3Y".parse().unwrap();
        let error: BoxError =
            format!("error sending request for url ({url}): GET /T0KEN/x key=K3Y refused").into();
        let words = words(&error, &url);
        assert!(
            !words.contains("T0KEN") && !words.contains("K3Y"),
            "{words}"
        );
        assert!(words.contains("refused"));
    }

    #[test]
    fn nor_a_part_of_the_url_in_other_words() {
        let url = "https://a.example/v1/T0KENT0KEN|x?key=K3YK3YK3Y&to=me";
        let error: BoxError =
            "no route v1 to /v1/T0KENT0KEN%7Cx with {\"key\": \"K3YK3YK3Y\"}: refused".into();
        let words = words(&error, &url.parse().unwrap());
        assert_eq!(
            &*words,
            "no route v1 to /v1/…%7Cx with {\"key\": \"…\"}: refused"
        );
    }

    #[test]
    fn an_error_is_cut_where_a_character_ends() {
        let error: BoxError = "ä".repeat(500).into();
        let words = words(&error, &"http://a/".parse().unwrap());
        assert!(words.len() <= 260 && words.ends_with('…'));
    }
}
