"""`GET /docs`: Swagger UI, every part of it from this server. Knows nothing of what it shows but `/openapi.json`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files

from anyio import to_thread
from fastapi import APIRouter, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html

from serving.errors import NotFound

SPECIFICATION = "/openapi.json"
ASSETS: Mapping[str, str] = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon-32x32.png": "image/png",
}
_CARRIER = "fastapi_swagger.resources"  # the package that carries Swagger UI's distribution
# The page may load nothing from elsewhere, whatever the specification or the scripts would have it do.
_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# No request to the online validator; nothing is kept in the browser.
_PARAMETERS = {"validatorUrl": None, "persistAuthorization": False, "displayRequestDuration": True}

router = APIRouter(include_in_schema=False)


@router.get("/docs")
async def show_docs(request: Request) -> Response:
    """The page."""
    page = get_swagger_ui_html(
        openapi_url=SPECIFICATION,
        title=request.app.title,
        swagger_js_url="/docs/swagger-ui-bundle.js",
        swagger_css_url="/docs/swagger-ui.css",
        swagger_favicon_url="/docs/favicon-32x32.png",
        swagger_ui_parameters=_PARAMETERS,
    )
    page.headers["Content-Security-Policy"] = _POLICY
    return page


@router.get("/docs/{asset}")
async def show_asset(asset: str) -> Response:
    """A part of it."""
    if asset not in ASSETS:
        raise NotFound(f"there is no route /docs/{asset}")
    content = await to_thread.run_sync(files(_CARRIER).joinpath(asset).read_bytes)
    headers = {"Cache-Control": "private, max-age=86400", "X-Content-Type-Options": "nosniff"}
    return Response(content, media_type=ASSETS[asset], headers=headers)
