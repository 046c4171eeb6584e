-- Which records have changed since a version, and the latest version of all.
local kind = redis.call('TYPE', KEYS[1]).ok
if kind ~= 'zset' and kind ~= 'none' then redis.call('DEL', KEYS[1]) end
local top = redis.call('ZREVRANGE', KEYS[1], 0, 0, 'WITHSCORES')
local version = tonumber(top[2]) or 0
if not (version >= 0 and version < 9007199254740992) then
  redis.call('DEL', KEYS[1])
  version = 0
end
-- Versions that went back tell of a history that is lost: all, then.
local since = tonumber(ARGV[1])
if version < since then since = 0 end
return { version, redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. string.format('%.0f', since), '+inf') }
