"use strict";
const key = sessionStorage.getItem("kvarena-key");
window.SwaggerUIBundle({
  url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null,
  requestInterceptor(request) {
    if (key && !request.headers.Authorization) request.headers.Authorization = "Bearer " + key;
    return request;
  },
});
